"""``explain``: rewards, deciding rules and their scores of one pair, from a score folder, a judge or a label file."""

import json
from dataclasses import replace

import numpy as np
import pytest
from commands import pair_rows, write_rows
from refusals import refused
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool, tiny_reward_model

import adaptrm
from adaptrm.data.labels import read_labels
from adaptrm.data.rows import source_hash
from adaptrm.data.scores import Scores, read_parts, write_manifest, write_part
from adaptrm.evidence.weights import EvidenceWeights
from adaptrm.explain import ExplainJob, explain, for_people
from adaptrm.explain.job import NUMBERS
from adaptrm.judge.score import ScoreJob, score
from adaptrm.label import LabelJob, label
from adaptrm.results import show
from adaptrm.selection.top_rules import selection_score

POOL, PAIRS, K = tiny_pool(6), tiny_pairs(5), 3
HOSTILE = "[bold]x[/bold] [link=http://a]y[/link] :smile: \x1b[31mred\x1b[0m \x07\u202egnp.exe\r\n| a | b |"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A judge, a reward model, a pool, pairs with hostile texts among them, their scores and labels."""
    out = tmp_path_factory.mktemp("explain")
    tiny_causal_lm(out / "lm")
    tiny_reward_model(out / "rewards")
    (out / "pool.yaml").write_text(POOL.to_yaml())
    pairs = [*PAIRS[:4], replace(PAIRS[4], response_a=HOSTILE, response_b=HOSTILE * 30, preferred="b")]
    pairs[2] = replace(PAIRS[2], response_a=PAIRS[2].response_b, response_b=PAIRS[2].response_a)
    write_rows(out / "pairs.jsonl", pair_rows(pairs))
    score(ScoreJob(*(str(out / name) for name in ("pairs.jsonl", "lm", "pool.yaml", "scores")), part_size=2))
    label(LabelJob(str(out / "scores"), str(out / "labels.jsonl"), k=K))
    return out


def job(made, **given) -> ExplainJob:
    files = {name: str(made / given.pop(name)) for name in ("scores", "judge", "labels", "rules") if name in given}
    return ExplainJob(str(made / "rewards"), str(made / "pairs.jsonl"), k=K, **files, **given)


@pytest.fixture(scope="module")
def by_scores(made) -> list[dict]:
    """What the score folder explains of each pair."""
    return [explain(job(made, scores="scores", id=pair.id)) for pair in PAIRS]


def test_it_says_what_select_and_the_reward_model_say(made, by_scores):
    pairs = adaptrm.load_pairs(made / "pairs.jsonl")
    rewards = adaptrm.RewardModel.from_pretrained(made / "rewards").score_pairs(pairs)
    parts = [*read_parts(made / "scores")]
    a, b, relevance = (np.concatenate([getattr(one, name) for one in parts]) for name in ("a", "b", "relevance"))
    chosen = adaptrm.select(a, b, relevance, k=K)
    for row, (pair, found) in enumerate(zip(pairs, by_scores, strict=True)):
        assert (found["id"], found["response_a"], found["response_b"]) == (pair.id, *pair.responses)
        assert found["prompt"] == [dict(message) for message in pair.prompt]
        said = found["rewards"]
        np.testing.assert_allclose([said["a"], said["b"]], rewards[row], atol=1e-5)
        assert said["difference"] == said["a"] - said["b"]
        assert said["probability_a"] == pytest.approx(1 / (1 + np.exp(-said["difference"])))
        assert found["preferred"]["rewards"] == ("a" if said["difference"] > 0 else "b")
        rules = found["deciding_rules"]
        known = [(POOL[i].id, POOL[i].text, POOL[i].sign) for i in chosen.rules[row]]
        assert [(rule["id"], rule["text"], rule["sign"]) for rule in rules] == known
        for rule, at in zip(rules, chosen.rules[row], strict=True):
            assert (rule["score_a"], rule["score_b"]) == (a[row, at], b[row, at])
            assert rule["relevance"] == relevance[row, at]
            assert rule["selection_score"] == pytest.approx(relevance[row, at] + abs(a[row, at] - b[row, at]) / 2)
        assert found["rules"]["margin"] == chosen.margin[row] == pytest.approx(sum(r["difference"] for r in rules))
        assert found["preferred"]["rules"] == {1: "a", -1: "b"}[int(chosen.preferred[row])]
        assert found["preferred"]["people"] == pair.preferred
        assert found["agree"] == (found["preferred"]["rules"] == found["preferred"]["rewards"])
    assert json.loads(json.dumps(by_scores)) == by_scores
    assert {found["preferred"]["rules"] for found in by_scores} == {"a", "b"}


def test_a_judge_that_is_asked_now_says_the_same(made, by_scores):
    for found in (by_scores[1], by_scores[4]):
        now = explain(job(made, judge="lm", rules="pool.yaml", id=found["id"]))
        for rule, before in zip(now.pop("deciding_rules"), found["deciding_rules"], strict=True):
            assert rule == pytest.approx(before, abs=1e-5) or rule["text"] == before["text"]
            np.testing.assert_allclose([rule[n] for n in NUMBERS], [before[n] for n in NUMBERS], atol=1e-5)
        assert now.pop("rules")["margin"] == pytest.approx(found["rules"]["margin"], abs=1e-5)
        assert now == {name: found[name] for name in now}


def test_without_an_id_it_is_the_first_pair(made, by_scores):
    assert explain(job(made, scores="scores")) == by_scores[0]
    assert explain(job(made, judge="lm", rules="pool.yaml"))["id"] == PAIRS[0].id


def test_a_label_file_names_the_rules_that_decided(made, by_scores):
    for found, said in zip(by_scores, read_labels(made / "labels.jsonl"), strict=True):
        labelled = explain(job(made, labels="labels.jsonl", scores="scores", id=found["id"]))
        assert labelled["rules"].pop("selected_by") == str(made / "labels.jsonl")
        assert labelled["rules"] == {name: found["rules"][name] for name in ("margin", "probability_a")}
        assert {**labelled, "rules": found["rules"]} == found
        # Alone it knows no scores, and with a pool the texts.
        alone = explain(job(made, labels="labels.jsonl", id=found["id"]))
        assert [rule["id"] for rule in alone["deciding_rules"]] == list(said.rules)
        assert all(rule[name] is None for rule in alone["deciding_rules"] for name in ("text", *NUMBERS))
        assert alone["preferred"] == found["preferred"] and alone["agree"] == found["agree"]
        named = explain(job(made, labels="labels.jsonl", rules="pool.yaml", id=found["id"]))
        assert [rule["text"] for rule in named["deciding_rules"]] == [r["text"] for r in found["deciding_rules"]]


def test_a_probability_of_a_label_is_of_the_chosen_side(made, tmp_path):
    rows = [json.loads(line) | {"probability": 0.75} for line in (made / "labels.jsonl").read_text().splitlines()]
    file = write_rows(tmp_path / "labels.jsonl", rows)
    for pair, row in zip(PAIRS, rows, strict=True):
        found = explain(replace(job(made, id=pair.id), labels=str(file)))
        chosen_a = row["chosen"][0]["content"] == found["response_a"]
        assert found["rules"]["probability_a"] == (0.75 if chosen_a else 0.25)
        assert found["preferred"]["rules"] == ("a" if chosen_a else "b")


def test_evidence_by_given_weights_is_that_of_label(made, tmp_path):
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((6, 9)).astype(np.float32)
    weights = EvidenceWeights(rng.uniform(0.1, 1, 6).astype(np.float32), mixed @ mixed.T / 9, POOL.ids)
    weights.save(tmp_path / "weights.json")
    out = str(tmp_path / "labels.jsonl")
    evidence = adaptrm.evidence.job.EvidenceOptions(weights=str(tmp_path / "weights.json"))
    label(LabelJob(str(made / "scores"), out, strategy="evidence", k=K, evidence=evidence))
    for said in read_labels(out):
        found = explain(
            job(made, scores="scores", id=said.id, strategy="evidence", weights=str(tmp_path / "weights.json"))
        )
        assert [rule["id"] for rule in found["deciding_rules"]] == list(said.rules)
        assert abs(found["rules"]["margin"]) == pytest.approx(said.rule_margin)
        p = found["rules"]["probability_a"]
        assert max(p, 1 - p) == pytest.approx(said.probability) and 0 < p < 1
        by = [rule["selection_score"] for rule in found["deciding_rules"]]
        assert by == sorted(by, reverse=True)
        at = POOL.ids.index(said.rules[0])
        one = found["deciding_rules"][0]
        scale = weights.arrays().scale[at]
        expected = selection_score(one["score_a"], one["score_b"], one["relevance"], 0.5, scale)
        assert one["selection_score"] == pytest.approx(float(expected))


def write_folder(folder, made, rules=None, **arrays):
    """A score folder of the pairs, given as arrays."""
    pairs = str(made / "pairs.jsonl")
    manifest = {"rules": list(POOL.ids), "pairs": pairs, "pairs_sha256": source_hash(pairs), "parts": 1}
    chosen = {} if rules is None else {"adapter_sha256": {}, "k": rules.shape[1]}
    write_manifest(folder, manifest | chosen)
    one = np.ones((len(PAIRS), len(POOL)), np.float32)
    values = {name: arrays.get(name, one) for name in ("a", "b", "relevance")}
    whole = Scores([p.id for p in PAIRS], list(POOL.ids), **values, **dict.fromkeys(REST, one), rules=rules)
    write_part(folder, 0, whole)


REST = ("log_odds_a", "log_odds_b", "label_mass_a", "label_mass_b")


def test_rules_that_an_adapter_chose_are_those_that_decide(made, tmp_path):
    rng = np.random.default_rng(1)
    rules = np.stack([rng.permutation(6)[:2] for _ in PAIRS]).astype(np.int32)
    asked = np.zeros((len(PAIRS), 6), bool)
    np.put_along_axis(asked, rules, True, axis=1)
    a, b = (np.where(asked, rng.uniform(-1, 1, asked.shape), np.nan).astype(np.float32) for _ in "ab")
    write_folder(tmp_path / "few", made, rules, a=a, b=b, relevance=np.where(asked, 0.5, np.nan).astype(np.float32))
    for row, pair in enumerate(PAIRS):
        found = explain(replace(job(made, id=pair.id), scores=str(tmp_path / "few")))
        assert {rule["id"] for rule in found["deciding_rules"]} == {POOL.ids[rule] for rule in rules[row]}
        assert found["rules"]["margin"] == pytest.approx(np.nansum(a[row] - b[row]), abs=1e-6)
        assert all(rule["text"] is None for rule in found["deciding_rules"])  # this folder holds no texts
    with_texts = explain(replace(job(made, rules="pool.yaml"), scores=str(tmp_path / "few")))
    assert all(rule["text"] == POOL[POOL.ids.index(rule["id"])].text for rule in with_texts["deciding_rules"])


def test_a_tie_of_the_rules_agrees_with_nothing(made, tmp_path, capsys):
    write_folder(tmp_path / "tied", made)
    found = explain(replace(job(made), scores=str(tmp_path / "tied")))
    assert (found["rules"]["margin"], found["rules"]["probability_a"]) == (0, 0.5)
    assert found["preferred"]["rules"] is None and found["agree"] is None
    assert "undecided" in printed(found, capsys)


def printed(found: dict, capsys) -> str:
    show(for_people(found), as_json=False)
    return capsys.readouterr().out


def test_people_see_texts_as_they_are_and_nothing_acts(made, by_scores, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where markup would show
    found = by_scores[4]
    rules = [rule | {"id": f"r[bold]{at}", "text": HOSTILE} for at, rule in enumerate(found["deciding_rules"])]
    shown = printed(found | {"deciding_rules": rules, "id": HOSTILE, "model": HOSTILE}, capsys)
    assert shown.count("[bold]x[/bold]") >= 5 and "r[bold]2" in shown and ":smile:" in shown
    for acts in ("\x1b[31m", "\x07", "\u202e", "\x1b]8;"):
        assert acts not in shown
    assert "\\x1b[31mred" in shown
    # The long response is shortened, the short one whole.
    assert " ... " in " ".join(shown.split()) and len(shown) < 5000


def test_people_see_the_verdict(by_scores, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = {True: "reward model and rules agree", False: "reward model and rules disagree"}
    for found in by_scores:
        shown = printed(found, capsys)
        assert words[found["agree"]] in shown
        lines = [line.split() for line in shown.splitlines()]
        for rule in found["deciding_rules"]:
            assert any(line[:1] == [f"{rule['id']}:"] and f"{rule['difference']:.3f}" in line for line in lines)
        assert f"probability {found['rewards']['probability_a']:.3f}" in " ".join(shown.split())
    turned = by_scores[0] | {"agree": not by_scores[0]["agree"]}
    assert words[turned["agree"]] in printed(turned, capsys)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a reward alone explains nothing: give --scores DIR, --judge MODEL with --rules POOL, or --labels FILE"),
        ({"scores": "scores", "judge": "lm"}, "--scores and --judge both say what the judge says; give one"),
        ({"judge": "lm"}, "--judge needs --rules POOL"),
        ({"scores": "scores", "id": "p9"}, "/scores: holds no scores of a pair 'p9'; give an --id of "),
        ({"judge": "lm", "rules": "pool.yaml", "id": "p9"}, "/pairs.jsonl: has no pair 'p9'"),
        ({"labels": "labels.jsonl", "strategy": "all"}, "--labels names the rules that decided; leave out --strategy"),
        (
            {"scores": "scores", "strategy": "random"},
            "--strategy random: what it selects does not follow from the pair",
        ),
        ({"scores": "scores", "strategy": "fixed"}, "give --labels FILE"),
        ({"scores": "scores", "strategy": "evidence"}, "--strategy evidence and --weights FILE"),
        ({"scores": "scores", "weights": "w.json"}, "--strategy evidence and --weights FILE"),
        ({"scores": "none"}, "/none: no manifest.json; this is not a score folder"),
        ({"labels": "none.jsonl"}, "/none.jsonl: does not exist"),
    ],
)
def test_what_does_not_go_together_is_one_line(made, given, message):
    assert message in refused(explain, job(made, **given))


def test_k_is_checked_and_names_where_the_scores_are_from(made):
    message = refused(explain, replace(job(made, scores="scores"), k=7))
    assert message == f"{made}/scores: k is 7; with 6 rules it must be 1 to 6"


def test_files_that_do_not_belong_together(made, tmp_path):
    # Other pairs than those scored.
    other = write_rows(tmp_path / "pairs.jsonl", pair_rows(tiny_pairs(2)))
    assert "not the pairs that" in refused(explain, replace(job(made, scores="scores"), pairs=str(other)))
    # Labels of other texts, of other pairs, without rules, with rules that the pool does not know.
    rows = [json.loads(line) for line in (made / "labels.jsonl").read_text().splitlines()]
    rows[0]["chosen"][0]["content"] += "!"
    rows[1]["rules"] = []
    rows[2]["rules"] = ["r9"]
    file = str(write_rows(tmp_path / "labels.jsonl", rows[:3]))
    for at, message in enumerate(
        (
            "the label of 'p0' is of other texts than",
            "names no rules in the label of pair 'p1'; give --scores or --judge",
            f"rule 'r9' is not among those of {made}/pool.yaml",
            "has no label of pair 'p3'",
        )
    ):
        assert message in refused(explain, replace(job(made, rules="pool.yaml", id=f"p{at}"), labels=file))
    # Another pool than the folder's, and weights of other rules.
    (tmp_path / "pool.yaml").write_text(tiny_pool(5).to_yaml())
    assert "was not scored with pool tiny" in refused(
        explain, replace(job(made, scores="scores"), rules=str(tmp_path / "pool.yaml"))
    )
    EvidenceWeights(np.ones(2, np.float32), np.eye(2, dtype=np.float32), ("x", "y")).save(tmp_path / "w.json")
    of_others = job(made, scores="scores", strategy="evidence", weights=str(tmp_path / "w.json"))
    assert "of other rules than those that were scored" in refused(explain, of_others)


def test_no_pairs_and_a_model_whose_rewards_are_no_numbers(made, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    empty = replace(job(made, judge="lm", rules="pool.yaml"), pairs=str(tmp_path / "empty.jsonl"))
    assert refused(explain, empty) == f"{tmp_path}/empty.jsonl: holds no pairs"
    from safetensors.numpy import load_file, save_file

    broken = tiny_reward_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    save_file(
        {name: x * np.float32("nan") if name == "score.weight" else x for name, x in tensors.items()},
        broken / "model.safetensors",
    )
    message = refused(explain, replace(job(made, scores="scores"), model=str(broken)))
    assert message.startswith(f"{broken}: the reward of pair 'p0' is not finite in float32")
