"""``adaptrm export --push-to-hub``: what goes up, to whom it is shown, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENV, free_port, in_process
from hub import TOKEN, local_hub
from refusals import refused
from stores import new_folder, upload
from tiny import random_state, tiny_config, tiny_tokenizer

from adaptrm.card.license import License
from adaptrm.card.page import About
from adaptrm.data.chat import ChatTokenizer
from adaptrm.models import SequenceClassifier
from adaptrm.push import check_push, push
from adaptrm.train.save import save_model

EXPORT = {
    *("README.md", "chat_template.jinja", "config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder as ``export`` leaves it, from a model under Llama's license."""
    folder = tmp_path_factory.mktemp("push")
    tiny_tokenizer(folder / "tokenizer")
    _, params = random_state(SequenceClassifier, tiny_config(), num_labels=1)
    chat, about = ChatTokenizer.from_folder(folder / "tokenizer"), About(models=["a/b"], license=License("llama3.1"))
    save_model(folder / "Llama-rm", params, tiny_config().to_hf(), chat, ("<|endoftext|>", 0), about)
    return folder / "Llama-rm"


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """The same under no license, and with files that must stay here."""
    folder = Path(shutil.copytree(exported, tmp_path / "rm"))
    (folder / "README.md").write_text("---\ntags:\n- adaptrm\n---\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for name in ("pairs.jsonl", "labels.parquet", "rows.json", ".env", "model.pt", "model-best.safetensors", "x.jinja"):
        (folder / name).write_text("secret")
    for name in ("data/config.json", "checkpoints/1/model.safetensors", ".git/config", ".cache/tokenizer.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("secret")
    return folder


@pytest.fixture
def hub_of(monkeypatch):
    """Makes a hub and has this process use it, as HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE would."""
    from huggingface_hub import constants

    made = []

    def make(**state):
        made.append(local_hub(**state))
        hub = made[-1].__enter__()
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        return hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield make
    for hub in made:
        hub.__exit__(None, None, None)


def test_the_files_of_the_model_go_up_and_no_others(folder, hub_of, capsys):
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "LICENSE", "figures/a.png"]
    hub = hub_of(present=old)
    assert push(folder, "owner/name") == f"{hub.endpoint}/owner/name"
    assert hub.visibility == "private" and hub.tokens == {f"Bearer {TOKEN}"}
    sent = {name: content for name, content in hub.files.items() if content is not None}
    assert sent.keys() == EXPORT | {"additional_chat_templates/tools.jinja"}
    assert all(content == (folder / name).read_bytes() for name, content in sent.items())
    # Old weights, which would be read instead of the new ones, go; what others put there stays.
    assert {name for name, content in hub.files.items() if content is None} == set(old[:2])
    assert ".env, .git/config" in capsys.readouterr().err


def test_a_command_of_its_own_process_by_the_usual_variables(folder):
    with local_hub() as hub:
        env = ENV | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        code = "import sys\nfrom adaptrm.push import push\nprint(push(*sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, folder, "owner/name"], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.endpoint}/owner/name"
    assert hub.visibility == "private" and "config.json" in hub.files


def test_public_only_where_it_is_asked_for(folder, hub_of, capsys):
    hub = hub_of()
    push(folder, "owner/name", public=True)
    assert hub.visibility == "public" and hub.files
    again = hub_of(visibility="public")
    said = refused(push, folder, "owner/name")
    assert said == "owner/name: is public; make it private there, or give --public" and not again.files
    push(folder, "owner/name", public=True)
    assert again.files
    private = hub_of(visibility="private")
    push(folder, "owner/name", public=True)
    assert private.visibility == "private" and private.files
    assert "was private before and stays so" in capsys.readouterr().err


def test_a_license_that_asks_for_a_name(exported, hub_of, capsys):
    hub = hub_of()
    said = refused(push, exported, "owner/name", public=True)
    assert "the Llama 3.1 Community License asks for a name that begins with 'Llama'" in said
    assert not hub.requests
    push(exported, "owner/name")
    assert hub.files.keys() == EXPORT and "before it is handed on: the Llama 3.1" in capsys.readouterr().err


def test_from_a_store(folder, cache, hub_of):
    hub = hub_of()
    push(upload(folder, new_folder("memory")), "owner/name")
    assert hub.files.keys() == EXPORT


@pytest.mark.parametrize("status", [401, 402, 403, 404, 500])
def test_who_is_not_let_in_reads_one_line(folder, hub_of, status):
    hub = hub_of(refuses=status)
    said = refused(push, folder, "owner/name")
    assert said.startswith("owner/name: cannot be uploaded: ") and str(status) in said.partition("http:")[0]
    assert said.endswith("check the token, its right to write, and the network")
    assert TOKEN not in said and not hub.files


def test_without_a_network(folder, hub_of, monkeypatch):
    from huggingface_hub import constants

    hub_of()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    said = refused(push, folder, "owner/name")
    assert said.startswith("owner/name: cannot be uploaded: ") and TOKEN not in said


def test_what_is_refused_before_anything_is_asked(folder, hub_of, monkeypatch, tmp_path):
    hub = hub_of()
    for name in (
        "name",
        "a/b/c",
        "owner/",
        "/name",
        "owner/na me",
        "owner/../x",
        "owner/-x",
        "https://x/y",
        "",
        "o/n\n",
    ):
        assert "is no name on the hub; give OWNER/NAME" in refused(check_push, name)
        assert "is no name on the hub" in refused(push, folder, name)
    (folder / "config.json").unlink()
    assert "no config.json; this is no whole export" in refused(push, folder, "owner/name")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "--push-to-hub: no token; set HF_TOKEN" in refused(check_push, "owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE keeps everything from the hub" in refused(push, folder, "owner/name")
    assert not hub.requests


def test_the_command_line_refuses_before_it_reads_the_run(tmp_path, monkeypatch, capsys):
    for given, said in (
        (["--public"], "--public goes with --push-to-hub OWNER/NAME"),
        (["--push-to-hub", "no-owner"], "--push-to-hub: 'no-owner' is no name on the hub; give OWNER/NAME"),
    ):
        code, _, err = in_process(monkeypatch, capsys, "export", tmp_path / "no-run", tmp_path / "out", *given)
        assert (code, err) == (2, f"adaptrm: {said}\n")
