"""The measuring tools run as a user runs them, and say what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENV, QUICK, pair_rows, write_rows
from tiny import random_state, tiny_causal_lm, tiny_config, tiny_pairs, tiny_pool

from adaptrm.data.chat import ChatTokenizer
from adaptrm.models import SequenceClassifier
from adaptrm.train.save import save_model

TOOLS = Path(__file__).parent.parent / "tools"
RULES = 3


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tools")
    tiny_causal_lm(folder / "lm")
    (folder / "pool.yaml").write_text(tiny_pool(RULES).to_yaml())
    rows = [row | {"preferred": "a"} for row in pair_rows(tiny_pairs(3))]
    pairs = write_rows(folder / "pairs.jsonl", rows)
    return ["--judge", str(folder / "lm"), "--pairs", str(pairs), "--rules", str(folder / "pool.yaml"), "--k", "2"]


def run(tool: str, *arguments: str) -> dict:
    command = [sys.executable, str(TOOLS / tool), *arguments]
    done = subprocess.run(command, env=ENV | QUICK, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_two_settings_of_a_judge_are_compared(arguments):
    pytest.importorskip("qwix", reason="pip install 'adaptrm[int8]'")
    settings = ("conversation-first", "rule-first,bfloat16,int8")
    found = run("compare_judges.py", *settings, *arguments)
    assert (found["pairs"], found["rules"]) == (3, RULES)
    assert 0 < found["difference_of_scores"]["mean"] < found["difference_of_scores"]["max"] <= 2
    for name in ("rank_correlation_of_scores", "rank_correlation_of_differences"):
        assert found[name]["by_rule"].keys() == {f"r{i}" for i in range(RULES)}
        assert -1 <= found[name]["least"] <= found[name]["median"] <= 1
    assert 0 <= found["labels_agree"] <= 1 and 1 / 2 <= found["selected_rules_in_common"] <= 1
    assert tuple(found["settings"]) == settings
    one, two = found["settings"].values()
    for told in (one, two):
        assert 0 < told["label_mass"] <= 1 and 0 <= told["agreement_with_people"] <= 1 and told["seconds"] > 0
    assert one["parameter_bytes"] > 2 * two["parameter_bytes"]


@pytest.mark.slow
def test_a_judge_is_attacked(arguments):
    found = run("attack_judge.py", *arguments, "--limit", "2")
    assert (found["pairs"], found["rules"]) == (2, RULES)
    for name, by_quoting in found["texts"].items():
        assert by_quoting.keys() == {"quoted", "unquoted"}, name
        for figures in by_quoting.values():
            assert abs(figures["mean_shift"]) > 0 and 0 <= figures["labels_turned"] <= 1
    # Quoting changes what forges a heading, and nothing else.
    texts = found["texts"]
    assert texts["asks for Yes"]["quoted"] == texts["asks for Yes"]["unquoted"]
    assert texts["forges the question"]["quoted"] != texts["forges the question"]["unquoted"]


@pytest.mark.slow
def test_training_is_measured_beside_trl(arguments, tmp_path):
    pytest.importorskip("trl")
    rows = [row | {"preferred": "ab"[i % 2]} for i, row in enumerate(pair_rows(tiny_pairs(9)))]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    sizes = ("--layers", "1", "--batch", "4", "--batches", "2", "--row-length", "512")
    found = run("bench_train.py", "--model", arguments[1], "--pairs", f"tiny={pairs}", *sizes)["sets"]["tiny"]
    assert found["pairs"] == 8 and found["loss_gap"] < 1e-5
    sides = found["sides"]
    assert sides["shared"]["text_tokens"] < sides["unshared"]["text_tokens"] == sides["trl"]["text_tokens"]
    assert sides["trl_grouped"]["computed_tokens"] <= sides["trl"]["computed_tokens"]
    assert found["ratios"].keys() == {"shared_to_unshared", "shared_to_trl", "shared_to_trl_grouped"}


@pytest.mark.slow
def test_selection_is_measured_beside_others():
    found = run("bench_select.py", "--pairs", "700", "--rules", "40", "--repeats", "2", "--pandas-pairs", "5")
    assert found["equal"] and {"kernel", "top_k", "argpartition"} < found["sides"].keys()
    assert all(times["cpu_seconds"] > 0 for times in found["sides"].values())
    found = run("bench_select.py", "--label", "50", "20", "--rules", "7", "--part", "16")
    assert found["equal"] and [one["pairs"] for one in found["runs"]] == [50, 20]
    assert all(one["labelled"] == one["lines"] > 0 for one in found["runs"])


@pytest.mark.slow
def test_the_fit_of_evidence_is_measured():
    found = run("bench_evidence.py", "--pairs", "6000", "9000", "--rules", "20", "--part", "1000")
    assert found["good"] and [one["pairs_fitted"] for one in found["runs"]] == [6000, 9000]
    assert all(one[side]["cpu_seconds"] > 0 for one in found["runs"] for side in ("read", "fit"))


@pytest.mark.slow
def test_an_exported_reward_model_is_read_by_other_tools(tmp_path):
    pytest.importorskip("trl")
    tiny_causal_lm(tmp_path / "lm")
    _, params = random_state(SequenceClassifier, tiny_config(), num_labels=1)
    chat = ChatTokenizer.from_folder(tmp_path / "lm")
    save_model(tmp_path / "model", params, tiny_config().to_hf(), chat, ("<|endoftext|>", 0))
    here = ("--transformers-5", sys.executable, "--trl", sys.executable)
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"preferred": "b"} for row in pair_rows(tiny_pairs(3))])
    found = run("check_interop.py", str(tmp_path / "model"), *here, "--pairs", str(pairs), "--limit", "2")
    assert found["pairs"] == 9 and found["consumers"].keys() == {"transformers_5", "trl"}
    ways = [way for told in found["consumers"].values() for way in told["ways"].values()]
    assert len(ways) == 5 and all(0 < way["difference"] <= 1e-5 and way["other_verdicts"] == 0 for way in ways)

    # A config that does not say that the label is a score: the pipeline gives out its sigmoid.
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["problem_type"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(TOOLS / "check_interop.py"), str(tmp_path / "model"), *here[:2]]
    done = subprocess.run(command, env=ENV | QUICK, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "a consumer gives other scores" in done.stderr
