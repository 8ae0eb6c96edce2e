"""Options: every shipped config parses, a typo is an error with a hint, flags win, nothing in a config runs."""

from dataclasses import fields, is_dataclass

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from adaptrm.config import (
    LISTS_OF_TEXTS,
    TEXTS,
    VERBS,
    TrainOptions,
    config_folder,
    load_options,
    parse_options,
    to_yaml,
)

# How many options a user can set. A new one is a decision: first think whether the code can know the answer.
OPTION_COUNT = 66
SHIPPED = sorted(config_folder().glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Write a config, give its path."""

    def write(text: str | bytes) -> str:
        file = tmp_path / "mine.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


def leaf_types(kind) -> dict[str, object]:
    """Dotted key -> type of every option, whether its section is optional or not."""
    found = {}
    for field in fields(kind):
        inner = [t for t in (field.type, *getattr(field.type, "__args__", ())) if is_dataclass(t)]
        if inner:
            found |= {f"{field.name}.{key}": hint for key, hint in leaf_types(inner[0]).items()}
        else:
            found[field.name] = field.type
    return found


@pytest.mark.parametrize("config", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configs_parse(config):
    sections = yaml.safe_load(config.read_text())
    assert sections and set(sections) <= set(VERBS)
    for verb in sections:
        by_name, by_path = load_options(config.stem, verb), load_options(config, verb)
        assert by_name == by_path
        # What is written is what comes out: no key is read past.
        resolved = yaml.safe_load(to_yaml(verb, by_name))[verb]
        for key, value in sections[verb].items():
            if isinstance(value, dict):
                assert resolved[key] is not None
                assert all(resolved[key][k] == v for k, v in value.items() if not isinstance(v, dict))
            else:
                assert resolved[key] == value


def test_the_demo_has_every_verb_it_trains():
    assert "demo" in [file.stem for file in SHIPPED]
    assert {"judge", "reward"} <= set(yaml.safe_load((config_folder() / "demo.yaml").read_text()))


def test_the_number_of_options_is_a_decision():
    leaves = leaf_types(TrainOptions)
    assert len(leaves) == OPTION_COUNT, f"options were added or removed: {', '.join(leaves)}"


def test_every_text_option_is_kept_from_yaml():
    plain = {key for key, hint in leaf_types(TrainOptions).items() if hint is str or hint == str | None}
    # A list has no keys of its own on the command line: it is given as a whole.
    assert set(TEXTS) == {key for key in plain if not key.startswith("data.mix.")}
    lists = {key for key, hint in leaf_types(TrainOptions).items() if hint == tuple[str, ...]}
    assert set(LISTS_OF_TEXTS) == lists - {"model.rule_ids"}, "a run writes those down, nobody gives them"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward: {data: {row_lenght: 3}}", "reward.data.row_lenght: unknown key; did you mean 'row_length'?"),
        ("reward: {optimiser: {}}", "reward.optimiser: unknown key; did you mean 'optimizer'?"),
        ("reward: {max_step: 5}", "reward.max_step: unknown key; did you mean 'max_steps'?"),
        ("reward: {model: {scratch: {tokenizer: a, heads: 2}}}", "reward.model.scratch.heads: unknown key;"),
        ("reward: {zzzz: 1}", "reward.zzzz: unknown key; known: model, data, loss"),
        ("rewrad: {}", "unknown section 'rewrad'; known: judge, reward, adapter"),
        ("judge: {}", "has no section 'reward'; it has judge"),
        ("reward: {seed: many}", "reward.seed: Input should be a valid integer"),
        ("reward: {seed: 1.5}", "reward.seed: Input should be a valid integer"),
        ("reward: {optimizer: {learning_rate: -1}}", "learning_rate: Input should be greater than or equal to 0"),
        ("reward: {loss: {label_smoothing: 0.5}}", "reward.loss.label_smoothing: Input should be less than 0.5"),
        ("reward: {loss: {kind: listwise}}", "reward.loss.kind: Input should be 'bradley-terry', 'plackett-luce'"),
        ("reward: {loss: {center_rewards: -1}}", "center_rewards: Input should be greater than or equal to 0"),
        ("reward: {data: {mix: {pairs: x}}}", "reward.data.mix: Input should be a valid tuple"),
        ("reward: {data: {mix: [{pair: x}]}}", "reward.data.mix.0.pair: unknown key; did you mean 'pairs'?"),
        ("reward: {data: {mix: [{weight: 0}]}}", "reward.data.mix.0.weight: Input should be greater than 0"),
        ("reward: {optimizer: {b1: 7}}", "reward.optimizer.b1: Input should be less than 1"),
        ("reward: {optimizer: {clip_norm: 0}}", "reward.optimizer.clip_norm: Input should be greater than 0"),
        ("reward: {data: {row_length: 9999999999}}", "row_length: Input should be less than or equal to 1048576"),
        ("reward: {optimizer: {learning_rate: [1]}}", "reward.optimizer.learning_rate: Input should be a valid number"),
        ("reward: {optimizer: {schedule: cosin}}", "reward.optimizer.schedule: Input should be 'constant', 'linear'"),
        ("reward: {model: {dtype: float16}}", "reward.model.dtype: Input should be 'float32' or 'bfloat16'"),
        ("reward: {model: {scratch: {}}}", "reward.model.scratch.tokenizer: Field required"),
        ("reward: {model: {pretrained: 5}}", "reward.model.pretrained: Input should be a valid string"),
        ("reward: {watchdog_seconds: 0}", "reward.watchdog_seconds: Input should be greater than 0"),
        ("reward: {max_nonfinite_steps: -1}", "max_nonfinite_steps: Input should be greater than or equal to 0"),
        ("reward: {checkpoint: {keep_best: score}}", "reward.checkpoint.keep_best: Input should be a valid boolean"),
        ("reward: {data: [1]}", "reward.data: Input should be a dictionary"),
        ("reward: {1: 2}", "reward.1: "),
        ("reward: 5", "a config has one section a verb"),
        ("[1, 2]", "a config has one section a verb"),
        ("", "a config has one section a verb"),
        ("reward: {seed: 1", ": line 1: not valid YAML"),
        ("reward:\n  seed: 1\n bad", ": line 3: not valid YAML"),
        (b"reward: {seed: \x00}", ": line 1: not valid YAML: character U+0000"),
        (b"reward:\n  \xff", ": line 2: not valid YAML: not UTF-8; save the file as UTF-8"),
        ("reward: {seed: 1}\nreward: {}", ": line 2: not valid YAML: the key 'reward' comes twice"),
    ],
)
def test_wrong_configs_name_file_and_key(write, text, message):
    config = write(text)
    found = refused(load_options, config, "reward")
    assert found.startswith(config) and message in found


@pytest.mark.parametrize(
    "key",
    [
        "data.row_length",
        "data.rows_per_step",
        "data.pairs_per_step",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "epochs",
        "max_steps",
        "log_every_steps",
    ],
)
def test_counts_below_one_are_errors(key):
    for value in ("0", "-1"):
        assert f"reward.{key}: " in refused(load_options, "demo", "reward", {key: value})


def test_an_absent_config_is_an_error_that_lists_what_there_is(tmp_path):
    for config in ("dmeo", tmp_path / "none.yaml", tmp_path):
        found = refused(load_options, config, "reward")
        assert found.startswith(f"{config}: no such config") and "demo" in found


def test_flags_win_and_leave_the_rest(write):
    config = write("reward: {seed: 1, optimizer: {learning_rate: 1.0e-3, warmup_steps: 7}, data: {pairs: file}}")
    overrides = {
        "seed": "4",
        "optimizer.learning_rate": "2e-5",
        "optimizer.b2": 0.98,
        "data.exact_batch": "true",
        "data.pairs_per_step": "16",
        "model.scratch.tokenizer": "here",
        "model.scratch.hidden_size": "64",
        "data.pairs": "other",
        "max_steps": "null",
    }
    got = load_options(config, "reward", overrides)
    assert (got.seed, got.max_steps, got.epochs) == (4, None, 1)
    assert (got.optimizer.learning_rate, got.optimizer.b2, got.optimizer.warmup_steps) == (2e-5, 0.98, 7)
    assert (got.data.exact_batch, got.data.pairs_per_step, got.data.pairs) == (True, 16, "other")
    assert (got.model.scratch.tokenizer, got.model.scratch.hidden_size) == ("here", 64)
    assert load_options(config, "reward").seed == 1  # the file's own values are not touched


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.learning_rat", "1", "did you mean 'learning_rate'?"),
        ("optimzer.b1", "1", "did you mean 'optimizer'?"),
        ("seed.x", "1", "--seed.x: seed is one value"),
        ("optimizer", "5", "reward.optimizer: Input should be a dictionary"),
        ("", "1", "unknown key"),
        ("seed", "{", "--seed: line 1: not valid YAML"),
        ("seed", "\x00", "--seed: line 1: not valid YAML"),
        ("seed", "!!python/object/apply:os.getcwd []", "--seed: line 1: not valid YAML"),
    ],
)
def test_wrong_flags_name_the_flag(write, key, value, message):
    config = write("reward: {seed: 3}")
    assert message in refused(load_options, config, "reward", {key: value})


@pytest.mark.parametrize("name", ["on", "no", "null", "1", "1e3", "~", "[a]", "a: b", "2024-01-01", "#x", ""])
def test_paths_and_names_are_never_read_as_yaml(name):
    got = load_options("demo", "reward", dict.fromkeys(TEXTS, name))
    assert (got.data.pairs, got.data.labels, got.model.pretrained) == (name, name, name)
    assert got.model.scratch.tokenizer == name


@pytest.mark.parametrize("name", ["on", "null", "1", "a: b", "owner/name:split", "#x", ""])
def test_one_suite_is_a_name_and_several_are_a_list(name):
    given = {name: [name], "[one.jsonl, 'two, three']": ["one.jsonl", "two, three"], "[]": []}
    for value, suites in given.items():
        got = load_options("demo", "reward", {"data.drop_overlap": value})
        assert got.data.drop_overlap == tuple(suites)
    message = refused(load_options, "demo", "reward", {"data.drop_overlap": "[on]"})
    assert "reward.data.drop_overlap.0: Input should be a valid string, got True" in message


def options() -> st.SearchStrategy[dict]:
    """Sections with a few keys of every kind, names as awkward as YAML can make them."""
    names = st.none() | st.sampled_from(["on", "null", "~", "a: b", "#", "'", "\n", "1", "é ✓", "- x"]) | st.text()
    numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
    return st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0),
            "optimizer": st.fixed_dictionaries({}, optional={"learning_rate": numbers, "eps": numbers}),
            "data": st.fixed_dictionaries({}, optional={"pairs": names, "labels": names, "exact_batch": st.booleans()}),
            "model": st.fixed_dictionaries({"scratch": st.none() | st.builds(dict, tokenizer=names.map(str))}),
        },
    )


@settings(max_examples=40)
@given(options(), st.sampled_from(VERBS))
def test_a_resolved_config_gives_the_same_options_again(section, verb):
    parsed = parse_options(section, "here")
    again = yaml.safe_load(to_yaml(verb, parsed))
    assert list(again) == [verb]
    assert parse_options(again[verb], "there") == parsed


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [{mark}]",
        "!!python/object/new:os.mkdir [{mark}]",
        "!!python/object/apply:subprocess.call [[mkdir, {mark}]]",
        "!!python/name:os.system ''",
        "!mkdir {mark}",
    ],
)
def test_tags_of_yaml_run_nothing(write, tmp_path, value):
    mark = tmp_path / "mark"
    config = write(f"reward: {{seed: {value.format(mark=mark)}}}")
    assert "line 1: not valid YAML: the tag '!" in refused(load_options, config, "reward")
    assert not mark.exists()


def test_anchors_are_refused(write):
    message = refused(load_options, write("judge: &one {seed: 5}\nreward: *one"), "reward")
    assert "line 1: not valid YAML: &one and *one are not allowed; write the value out" in message
