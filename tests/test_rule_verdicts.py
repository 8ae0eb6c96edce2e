"""What people said of single rules against a judge's scores: areas, their errors, the joining of replies."""

import json

import numpy as np
import pytest
from commands import in_process, write_rows
from refusals import refused

from adaptrm.data.rows import source_hash
from adaptrm.data.scores import Scores, write_manifest, write_part
from adaptrm.health.check import check_scores
from adaptrm.health.people import areas
from adaptrm.rules import Rule, RulePool

PAIRS, RULES = 40, 5
SIGNS = np.array([1, -1, 1, -1, 1], np.float32)
POOL = RulePool("made", "1", tuple(Rule(f"r{i}", "c", f"The response is {i}.", int(s)) for i, s in enumerate(SIGNS)))


def counted(scores, truth) -> float:
    """The area by its definition."""
    difference = scores[truth][:, None] - scores[~truth][None]
    return float(((difference > 0) + (difference == 0) / 2).mean())


def written(folder, answers: np.ndarray, truth: np.ndarray, people=None) -> tuple[str, str]:
    """A score folder of pairs of replies and the rule labels of all replies; ``answers`` [2 * pairs, rules]."""
    prompts = [[{"role": "user", "content": f"{pair}?"}] for pair in range(len(answers) // 2)]
    replies = [(prompts[i // 2], f"reply {i % 2}") for i in range(len(answers))]
    rows = [
        {"id": f"p{i}", "prompt": prompt, "response_a": "reply 0", "response_b": "reply 1", "preferred": None}
        for i, prompt in enumerate(prompts)
    ]
    pairs = str(write_rows(folder / "pairs.jsonl", rows))
    scores = (answers * SIGNS).astype(np.float32)
    n, mass = len(rows), np.full((len(rows), RULES), 0.9, np.float32)
    known = {"rules": list(POOL.ids), "pool_hash": POOL.hash, "parts": 1, "count": n}
    write_manifest(folder / "scores", known | {"pairs": pairs, "pairs_sha256": source_hash(pairs)})
    arrays = (scores[0::2], scores[1::2], *[mass] * 5)
    write_part(folder / "scores", 0, Scores([row["id"] for row in rows], list(POOL.ids), *arrays))
    labels = [
        {
            "id": f"l{i}",
            "prompt": prompt,
            "response": response,
            "labels": people(truth[i], i) if people else said(truth[i]),
        }
        for i, (prompt, response) in enumerate(replies)
    ]
    return str(folder / "scores"), str(write_rows(folder / "labels.jsonl", labels))


def said(verdicts) -> dict[str, bool | None]:
    return {f"r{rule}": bool(verdict) for rule, verdict in enumerate(verdicts)}


def made(reads: float, alike: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Answers that know so much of the rule and say so much of everything alike, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.random((2 * PAIRS, RULES)) < 0.3
    answers = (
        reads * (truth - 0.3) + alike * rng.standard_normal((len(truth), 1)) + 0.1 * rng.standard_normal(truth.shape)
    )
    return np.round(np.clip(answers, -1, 1), 2), truth


def test_areas_are_those_of_the_definition():
    answers, truth = made(0.1, 0.1)
    answers[3, 0] = np.nan  # not asked
    verdicts = np.where(truth, 1, -1).astype(np.int8)
    verdicts[5:20, 2] = 0  # nobody said
    found, _ = areas(answers, verdicts)
    for rule in range(RULES):
        known = (verdicts[:, rule] != 0) & ~np.isnan(answers[:, rule])
        assert found[rule] == pytest.approx(counted(answers[known, rule], truth[known, rule]), abs=1e-12)


def test_the_error_is_that_of_verdicts_dealt_at_random():
    answers, truth = made(0, 0.2)  # what all rules say alike makes their areas err together
    answers[:, 1] = answers[:, 0]
    truth[:, 1] = truth[:, 0]
    verdicts = np.where(truth, 1, -1).astype(np.int8)
    one = slice(0, 1)
    true = int(truth[:, 0].sum())
    rough = answers[:, one] + 1e-3 * np.random.default_rng(1).random((len(answers), 1))  # no ties
    expected = np.sqrt((len(truth) + 1) / (12 * true * (len(truth) - true)))
    assert areas(rough, verdicts[:, one])[1] == pytest.approx(expected)
    rng = np.random.default_rng(2)
    dealt = [areas(answers, rng.permutation(verdicts))[0].mean() for _ in range(800)]
    assert areas(answers, verdicts)[1] == pytest.approx(np.std(dealt), rel=0.1)
    assert np.mean(dealt) == pytest.approx(0.5, abs=4 * np.std(dealt) / 800**0.5)


def test_a_judge_that_reads_and_one_that_says_one_thing_are_told_apart(tmp_path):
    found = {}
    for name, (reads, alike) in {"reads": (0.3, 0.1), "alike": (0, 0.3)}.items():
        (tmp_path / name).mkdir()
        answers, truth = made(reads, alike)
        if name == "alike":
            answers += 0.1 * truth.mean(axis=1, keepdims=True)
        scores, labels = written(tmp_path / name, answers, truth)
        result = check_scores(scores, POOL, labels=labels)
        found[name] = result["labels"], [line for line in result["warnings"] if "told from chance" in line]
        of = result["labels"]
        assert (of["replies"], of["labels_not_scored"], of["rules"]) == (2 * PAIRS, 0, RULES)
        kept = np.float32(answers)
        centred = kept - kept.mean(axis=1, keepdims=True)
        for rule in range(RULES):
            one = of["by_rule"][f"r{rule}"]
            assert one["auc"] == pytest.approx(counted(kept[:, rule], truth[:, rule]), abs=1e-9)
            assert one["auc_centred"] == pytest.approx(counted(centred[:, rule], truth[:, rule]), abs=1e-9)
            assert (one["true"], one["true"] + one["false"]) == (truth[:, rule].sum(), 2 * PAIRS)
        mean = np.mean([one["auc"] for one in of["by_rule"].values()])
        assert of["mean_auc"]["as_they_are"] == pytest.approx(mean)
    assert found["reads"][0]["mean_auc"]["centred"] > 0.9 and found["reads"][1] == []
    (line,) = found["alike"][1]
    assert line.endswith(f"against people's labels of {RULES} rules on {2 * PAIRS} replies")
    assert check_scores(scores, POOL).get("labels") is None


def test_only_what_people_said_of_scored_replies_counts(tmp_path):
    answers, truth = made(0.3, 0.1)

    def people(verdicts, reply) -> dict:
        kept = said(verdicts) | {"elsewhere": True, "r1": None}  # a rule of another pool; one that does not apply
        return {rule: verdict for rule, verdict in kept.items() if rule != "r2" or reply < 10}

    scores, labels = written(tmp_path, answers, truth, people)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    rows[0]["response"] = "another reply"
    rows.append(rows[1] | {"id": "again"})
    write_rows(tmp_path / "labels.jsonl", rows)
    found = check_scores(scores, POOL, labels=labels)["labels"]
    assert (found["replies"], found["labels_not_scored"]) == (2 * PAIRS - 1, 1)
    assert "r1" not in found["by_rule"] and "elsewhere" not in found["by_rule"]
    counts = found["by_rule"]["r2"]
    assert (counts["true"], counts["true"] + counts["false"]) == (truth[1:10, 2].sum() + truth[1, 2], 10)
    write_rows(tmp_path / "labels.jsonl", [row | {"response": "nowhere"} for row in rows])
    assert "none of its replies is a response of the scored pairs" in refused(check_scores, scores, POOL, None, labels)
    write_rows(tmp_path / "labels.jsonl", [row | {"labels": {"elsewhere": True}} for row in rows])
    assert "has no true or false for any rule of pool made" in refused(check_scores, scores, POOL, None, labels)
    write_rows(tmp_path / "labels.jsonl", [row | {"labels": {"r0": True}} for row in rows])
    assert "no rule is true of one scored reply and false" in refused(check_scores, scores, POOL, None, labels)


def test_rules_check_takes_labels(monkeypatch, capsys, tmp_path):
    answers, truth = made(0.3, 0.1)
    truth[:, 4] = False  # no area
    scores, labels = written(tmp_path, answers, truth)
    pool = tmp_path / "pool.yaml"
    pool.write_text(POOL.to_yaml())
    command = ("rules", "check", pool, "--scores", scores, "--labels", labels)
    code, printed, err = in_process(monkeypatch, capsys, *command)
    lines = [line.split() for line in printed.splitlines() if line.strip()]
    shown = {line[0]: line for line in reversed(lines)}  # the caption comes last
    assert (code, err) == (0, "") and shown["rule"][-1] == "labels"
    assert len(shown["r0"]) == len(shown["rule"]) + 2 == len(shown["r4"]) + 1  # two in per cent
    code, printed, err = in_process(monkeypatch, capsys, *command, "--json")
    found = check_scores(scores, POOL, labels=labels)
    assert (code, err) == (0, "") and json.loads(printed)["judge"] == found
    (line,) = (line for line in lines if line[:4] == ["AUC", "by", "rule", "labels"])
    assert line[4] == f"{found['labels']['mean_auc']['as_they_are']:.2f},"
    code, _, err = in_process(monkeypatch, capsys, "rules", "check", pool, "--labels", labels)
    assert code == 2 and err.startswith("adaptrm: --labels goes with --scores")
