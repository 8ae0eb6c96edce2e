"""The command line: what it loads, how it fails, what it prints; and the order in which modules may import."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import in_process

import adaptrm
from adaptrm import cli
from adaptrm.data.scores import Scores, write_manifest, write_part
from adaptrm.errors import InputError

PACKAGE = Path(adaptrm.__file__).parent
ROOT = PACKAGE.parent
HEAVY = ("jax", "flax", "orbax", "grain", "datasets", "transformers", "torch", "optax", "pyarrow")


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


# Every help page in one process; after each, which of the heavy modules are there.
HELP = """
import contextlib, io, json, sys
import typer
import adaptrm
from adaptrm.cli import app
command = typer.main.get_command(app)
pages = {}
verbs = [[]]
for name, verb in command.commands.items():
    verbs += [[name], *([name, inner] for inner in getattr(verb, "commands", []))]
for verb in verbs:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        app([*verb, "--help"], standalone_mode=False)
    loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
    pages[" ".join(verb)] = [text.getvalue(), loaded]
print(json.dumps(pages))
"""


@pytest.fixture(scope="module")
def help_pages() -> dict[str, list]:
    done = in_a_process(HELP, ",".join(HEAVY))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_loads_nothing_heavy(help_pages):
    assert {verb: loaded for verb, (_, loaded) in help_pages.items() if loaded} == {}


def test_every_verb_explains_itself(help_pages):
    verbs = set(help_pages) - {""}
    assert {"demo", "score", "label", "train", "evaluate", "export", "rules", "rules check"} <= verbs
    groups = {verb.rpartition(" ")[0] for verb in verbs} - {""}
    for verb in verbs:
        group, _, name = verb.rpartition(" ")
        assert f" {name} " in help_pages[group][0]
        assert "Usage: " in help_pages[verb][0] and ("--json" in help_pages[verb][0] or verb in groups)
    # Every option of every verb has a text beside it.
    import typer

    commands = dict(typer.main.get_command(cli.app).commands)
    for group in groups:
        commands |= {f"{group} {name}": verb for name, verb in commands[group].commands.items()}
    for name, command in commands.items():
        assert command.help
        bare = [p.name for p in command.params if not (getattr(p, "help", None) or p.name == "help")]
        assert not bare, f"{name}: {bare} have no help"


POOL = "name: n\nversion: 1\nrules:\n- {id: a, category: c, text: The response is kind.}\n"
GOOD = '{"id": "p0", "prompt": "?", "response_a": "a", "response_b": "b", "preferred": "a"}\n'


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pool.yaml").write_text(POOL)
    (tmp_path / "pairs.jsonl").write_text(GOOD)
    (tmp_path / "bad.jsonl").write_text(GOOD + '{"id": \n')
    (tmp_path / "bad.yaml").write_text("reward: {sed: 1}\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


SCORE = ("score", "--rules", "{0}/pool.yaml", "--out", "{0}/out")
EVALUATE = ("evaluate", "--data", "{0}/pairs.jsonl", "--out", "{0}/out.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "reward", "{0}/bad.yaml"), "{0}/bad.yaml: reward.sed: unknown key; did you mean 'seed'?"),
        (("train", "reward", "dmeo"), "dmeo: no such config"),
        (("train", "reward", "demo", "--sed", "1"), "demo: reward.sed: unknown key; did you mean 'seed'?"),
        (("train", "reward", "demo", "--seed"), "--seed: needs a value"),
        (("train", "reward", "demo", "--seed=x"), "demo: reward.seed: Input should be a valid integer"),
        (("train", "reward", "demo", "loose"), "unexpected argument 'loose'"),
        (
            ("train", "reward", "demo", "--out", "{0}/out", "--model.scratch.tokenizer", "{0}/none"),
            "{0}/none: has no tokenizer.json",
        ),
        ((*SCORE, "--judge", "{0}/empty", "--pairs", "{0}/none.jsonl"), "{0}/none.jsonl: does not exist"),
        ((*SCORE, "--judge", "{0}/empty", "--pairs", "{0}/bad.jsonl"), "{0}/bad.jsonl: line 2: not valid JSON"),
        ((*SCORE, "--judge", "{0}/empty", "--pairs", "owner/name"), "owner/name: no such file, and the hub does not"),
        ((*SCORE, "--judge", "{0}/none", "--pairs", "{0}/pairs.jsonl"), "{0}/none: this folder does not exist"),
        ((*SCORE, "--judge", "{0}/empty", "--pairs", "{0}/pairs.jsonl"), "{0}/empty: no config.json here"),
        ((*EVALUATE, "{0}/none"), "{0}/none: this folder does not exist"),
        ((*EVALUATE, "{0}/empty"), "{0}/empty: no config.json here"),
        (("rules", "check", "{0}/none"), "{0}/none: no such rule pool; give a YAML file or one of: "),
        (("rules", "check", "{0}/bad.yaml"), "{0}/bad.yaml: a rule pool has name, version and a list of rules"),
        (("label", "--scores", "{0}/none", "--out", "{0}/labels.jsonl"), "{0}/none: no manifest.json"),
        (("export", "{0}/none", "{0}/out"), "{0}/none: no config.yaml; this is not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, files, arguments, message):
    code, out, err = in_process(monkeypatch, capsys, *(a.format(files) for a in arguments))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"adaptrm: {message.format(files)}")


def test_a_message_of_several_lines_is_printed_as_one(monkeypatch, capsys):
    def fails():
        raise InputError("first\n  second")

    monkeypatch.setattr(cli, "app", fails)
    assert in_process(monkeypatch, capsys) == (2, "", "adaptrm: first   second\n")


def test_a_message_cannot_speak_to_the_terminal(monkeypatch, capsys):
    def fails():
        raise InputError("pair '\x1b[2J\x07\u202e\udc80': é 漢")

    monkeypatch.setattr(cli, "app", fails)
    assert in_process(monkeypatch, capsys)[2] == "adaptrm: pair '\\x1b[2J\\x07\\u202e\\udc80': é 漢\n"


def test_faults_of_ours_are_not_hidden(monkeypatch):
    def fails():
        raise ValueError("ours")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(ValueError, match="ours"):
        cli.main()


def test_training_that_failed_is_exit_code_1_and_one_line(monkeypatch, capsys):
    from adaptrm.train.reports import TrainingFailed

    def fails():
        raise TrainingFailed("step 3: not finite")

    monkeypatch.setattr(cli, "app", fails)
    assert in_process(monkeypatch, capsys) == (1, "", "adaptrm: step 3: not finite\n")


def test_a_wrong_command_fails_in_a_process_of_its_own():
    main = "from adaptrm.cli import main; main()"
    done = in_a_process(main, "train", "reward", "demo", "--optimizer.learning_rat", "1")
    assert (done.returncode, done.stdout) == (2, "")
    expected = "demo: reward.optimizer.learning_rat: unknown key; did you mean 'learning_rate'?"
    assert done.stderr == f"adaptrm: {expected}\n"
    done = in_a_process(main, "--version")
    assert (done.returncode, done.stdout) == (0, f"adaptrm {adaptrm.__version__}\n")


def test_json_is_printed_alone(monkeypatch, capsys, files):
    one = np.ones((1, 1), np.float32)
    digest = hashlib.sha256(GOOD.encode()).hexdigest()
    manifest = {"rules": ["a"], "pairs": str(files / "pairs.jsonl"), "pairs_sha256": digest, "count": 1, "parts": 1}
    write_manifest(files / "scores", manifest)
    write_part(files / "scores", 0, Scores(["p0"], ["a"], one, -one, one, one, one, one, one))
    command = ("label", "--scores", files / "scores", "--k", "1", "--out", files / "labels.jsonl")
    code, out, _ = in_process(monkeypatch, capsys, *command, "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["labelled"], result["agreement"], result["labels"]) == (1, 1.0, str(files / "labels.jsonl"))
    code, out, _ = in_process(monkeypatch, capsys, *command)
    assert code == 0 and "agreement" in out and "{" not in out


def test_results_for_people_and_for_machines(capsys):
    result = {"label_mass": 0.123456, "rules": {"a": 1}, "names": [1, 2], "nothing": None, "file": "[bold]x[/bold]"}
    cli.show(dict(result), as_json=True)
    assert json.loads(capsys.readouterr().out) == result
    cli.show(dict(result), as_json=False)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["label", "mass", "0.1235"] in shown and ["rules", "a:", "1"] in shown and ["nothing", "none"] in shown
    assert ["file", "[bold]x[/bold]"] in shown  # names of files are no markup


def test_dotted_options():
    given = ["--seed", "4", "--a.b=c=d", "--x=", "--model.pretrained", "--odd", "--seed", "5"]
    assert cli.dotted(given) == {"seed": "5", "a.b": "c=d", "x": "", "model.pretrained": "--odd"}
    assert cli.dotted([]) == {}
    for wrong in (["loose"], ["--a", "1", "loose"], ["-s", "1"]):
        with pytest.raises(InputError, match="unexpected argument"):
            cli.dotted(wrong)


# DESIGN.md section 2: imports go one way. What stands in one line does not import each other.
LAYERS = [
    ["errors", "prefix_tree", "products"],
    ["paths", "yaml_text", "progress", "watchdog", "preemption"],  # raise and show what errors defines
    ["config", "lock", "results", "options"],  # read and show through them
    ["attention", "parallel"],
    ["models"],
    ["hf", "data", "rules"],
    ["selection", "calibration"],
    ["judge", "health", "confidence", "reliability"],  # the judge selects in the program that scores
    ["evidence", "card"],
    ["train"],
    ["evaluate"],
    ["reward_model", "rule_adapter", "label", "export", "push"],
    ["plan", "doctor", "report", "demo", "merge", "explain"],
    ["rule_verbs", "measure_verbs", "model_verbs"],
    ["cli"],
]
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path):
    """Every module that a file imports, in functions too, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative imports hide what is imported"
            if node.module == "adaptrm":  # from adaptrm import paths
                yield from ((f"adaptrm.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def part(file: Path) -> str:
    """The package or the module of the top level that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_its_place_in_the_order():
    parts = {part(file) for file in MODULES} - {"__init__"}
    assert parts <= set(LAYER_OF), f"{sorted(parts - set(LAYER_OF))}: say in LAYERS where it stands"


def test_imports_go_one_way():
    wrong = []
    for file in MODULES:
        own = part(file)
        if own == "__init__":  # names its homes as text and imports them on first use
            assert not [name for name, _ in imported(file) if name.startswith("adaptrm")]
            continue
        for name, line in imported(file):
            top, *rest = name.split(".")
            if top != "adaptrm" or not rest or rest[0] == own or rest[0] == "__version__":
                continue
            if LAYER_OF[rest[0]] >= LAYER_OF[own]:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {own} imports {rest[0]}")
    assert not wrong, "\n".join(wrong)


def test_orbax_is_imported_in_one_place():
    users = {str(file.relative_to(PACKAGE)) for file in MODULES for name, _ in imported(file) if "orbax" in name}
    assert users == {"train/checkpoint.py"}


def test_the_hot_path_needs_neither_grain_nor_datasets():
    """At the top of a module an import is needed; inside of a function it can be done without."""
    for file in MODULES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"grain", "datasets", "torch"}, file


def test_modules_are_small_and_named_by_what_they_hold():
    folders = [PACKAGE, ROOT / "tests", ROOT / "tools"]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert not [file for file in files if "util" in file.stem]
    long = [str(file.relative_to(ROOT)) for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 400]
    assert not long


def test_the_public_names_are_there():
    for name in adaptrm.__all__:
        assert getattr(adaptrm, name).__name__ == name
    assert set(adaptrm.__all__) <= set(dir(adaptrm))
    with pytest.raises(AttributeError, match="no attribute 'Selecton'"):
        _ = adaptrm.Selecton
