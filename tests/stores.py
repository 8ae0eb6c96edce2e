"""Stores that need no network: memory://, and an S3 server that runs here."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from adaptrm import paths

BUCKET = "adaptrm-tests"


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server for this process and for the commands it starts; gives the endpoint."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # where credentials are missing, none are asked for
        "AWS_MAX_ATTEMPTS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        forget_settings()
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield endpoint
    forget_settings()
    server.stop()


def forget_settings() -> None:
    """Let the next call read endpoint and credentials from the environment again."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def new_folder(kind: str) -> str:
    """The address of a folder that nothing has used yet."""
    return f"{kind}://{BUCKET}/{uuid.uuid4().hex}"


def upload(source: Path, folder: str) -> str:
    for file in (file for file in source.rglob("*") if file.is_file()):
        paths.write_bytes(paths.join(folder, str(file.relative_to(source))), file.read_bytes())
    return folder
