"""A stand-in for the Hugging Face hub on this machine: it takes models and remembers every request."""

import base64
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

TOKEN = "hf_a_token_of_the_tests"


@dataclass
class Hub:
    """What the hub holds and what it was asked.

    Attributes:
        visibility: of the one repository; None while there is none.
        present: names of files that it holds before an upload.
        refuses: the status with which it answers whoever wants to create a repository.
        files: what was uploaded; None is deleted.
    """

    endpoint: str = ""
    visibility: str | None = None
    present: list[str] = field(default_factory=list)
    refuses: int | None = None
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    files: dict[str, bytes | None] = field(default_factory=dict)

    def app(self):
        from flask import Flask, jsonify, request

        app = Flask("hub")

        @app.before_request
        def remember():
            self.requests.append(f"{request.method} {request.path}")
            if request.path != "/api/agent-harnesses":
                self.tokens.add(request.headers.get("Authorization"))

        @app.post("/api/repos/create")
        def create():
            if self.refuses is not None:
                return jsonify(error="You don't have the right to create a model under this namespace"), self.refuses
            asked, url = request.get_json(), f"{self.endpoint}/owner/name"
            if self.visibility is not None:
                return jsonify(error="You already created this model repo", url=url), 409
            # By the name that huggingface_hub gives it, from version 1.0 on or before.
            is_private = asked.get("visibility", "private" if asked.get("private") else "public")
            self.visibility = is_private
            return jsonify(url=url)

        @app.get("/api/models/owner/name")
        def info():
            if self.visibility is None:
                return jsonify(error="Repository not found"), 404
            siblings = [{"rfilename": name} for name in self.present]
            return jsonify(id="owner/name", private=self.visibility == "private", siblings=siblings, sha="0" * 40)

        @app.get("/api/models/owner/name/tree/main")
        def tree():
            return jsonify([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.present])

        @app.post("/api/validate-yaml")
        def validate():
            return jsonify(errors=[], warnings=[])

        @app.post("/api/models/owner/name/preupload/main")
        def preupload():
            asked = request.get_json()["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return jsonify(files=modes)

        @app.post("/api/models/owner/name/commit/main")
        def commit():
            for line in map(json.loads, request.get_data().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "deletedFile":
                    self.files[value["path"]] = None
            return jsonify(commitUrl=f"{self.endpoint}/owner/name/commit/{'1' * 40}", commitOid="1" * 40)

        return app


@contextmanager
def local_hub(**state) -> Iterator[Hub]:
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    hub = Hub(**state)
    server = make_server("127.0.0.1", 0, hub.app(), threaded=True)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
