"""What a score folder tells of its judge, on made scores whose answer is known."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from commands import in_process, write_rows
from refusals import refused

from adaptrm import paths
from adaptrm.data.rows import source_hash
from adaptrm.data.scores import Scores, write_control, write_manifest, write_part
from adaptrm.health.check import check_scores
from adaptrm.health.measures import FEW, ONE_DIRECTION, agreement, auc, same_answer
from adaptrm.health.reduce import most_informative, reduce_pool
from adaptrm.health.sums import STEPS, Sums
from adaptrm.label import LabelJob, label
from adaptrm.rules import Rule, RulePool

PAIRS, RULES = 300, 8


def pool_of(rules: int = RULES, against: tuple[int, ...] = ()) -> RulePool:
    texts = [Rule(f"r{i}", "c", f"The response has quality {i}.", -1 if i in against else 1) for i in range(rules)]
    return RulePool("made", "1", tuple(texts))


def made(d: np.ndarray, relevance: float = 0.8) -> Scores:
    """Scores whose differences are ``d``, at levels of their own."""
    rng = np.random.default_rng(1)
    middle = rng.uniform(-0.2, 0.2, d.shape)
    a, b = (np.clip(middle + side * d / 2, -1, 1).astype(np.float32) for side in (1, -1))
    other = np.full(d.shape, relevance, np.float32), *np.full((4, *d.shape), 0.9, np.float32)
    return Scores([f"p{i}" for i in range(len(d))], [f"r{i}" for i in range(d.shape[1])], a, b, *other)


@pytest.fixture
def written(tmp_path):
    """Write pairs and their scores in parts of a hundred; gives the folder."""

    def write(scores: Scores, prefers=None, longer=None, pool: RulePool | None = None, name: str = "scores") -> str:
        n = len(scores)
        prefers = np.zeros(n) if prefers is None else prefers
        longer = np.zeros(n, int) if longer is None else longer
        rows = [
            {
                "id": id,
                "prompt": "?",
                "response_a": "a" * (50 + int(more)),
                "response_b": "b" * 50,
                "preferred": {1: "a", -1: "b", 0: None}[int(sign)],
            }
            for id, sign, more in zip(scores.ids, prefers, longer, strict=True)
        ]
        pairs = str(write_rows(tmp_path / f"{name}.jsonl", rows))
        folder, parts = str(tmp_path / name), -(-n // 100)
        known = {"pairs": pairs, "pairs_sha256": source_hash(pairs), "count": n, "parts": parts}
        write_manifest(
            folder, {"rules": scores.rule_ids, "pool_hash": (pool or pool_of(scores.a.shape[1])).hash} | known
        )
        for part in range(parts):
            rows = slice(100 * part, 100 * part + 100)
            arrays = {k: v[rows] for k, v in vars(scores).items() if k != "rule_ids" and v is not None}
            write_part(folder, part, Scores(**arrays, rule_ids=scores.rule_ids))
        return folder

    return write


def one_factor(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a judge says who says one thing about everything, and that thing."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal(PAIRS)
    return 0.2 * factor[:, None] + 0.08 * rng.standard_normal((PAIRS, RULES)), factor


def reading(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a judge says who answers each rule by itself, each right more often than not, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([-1.0, 1.0], PAIRS)
    return 0.1 * truth[:, None] + 0.2 * rng.standard_normal((PAIRS, RULES)), truth


def test_a_judge_who_says_one_thing_about_everything_is_flagged(written):
    d, factor = one_factor()
    scores = made(d)
    found = check_scores(written(scores, prefers=-np.sign(factor)), pool_of())
    values = np.linalg.eigvalsh((scores.a - scores.b).astype(np.float64).T @ (scores.a - scores.b))
    assert found["first_direction"] == pytest.approx(values[-1] / values.sum(), abs=1e-6) and values[-1] > 0
    assert 0.8 < found["first_direction"] < 0.95
    one, *_, vote = found["warnings"]
    assert one.startswith(f"one direction carries {100 * found['first_direction']:.0f} % of what the judge says by 8")
    assert vote.startswith("its vote points at the worse response: it agrees with people on ")
    assert found["votes"]["max_discrepancy"] < 0.1 and found["mean_auc"]["as_they_are"] < 0.1
    # Less what all rules say alike, nothing is left.
    assert abs(found["votes"]["max_discrepancy_centred"] - 0.5) < 0.1


def test_a_judge_who_reads_the_rules_is_told_apart(written):
    d, truth = reading()
    found = check_scores(written(made(d), prefers=truth), pool_of())
    assert found["warnings"] == [] and found["first_direction"] < ONE_DIRECTION
    assert (found["no_opinion"], found["repeats"], found["never_decide"]) == ({}, {}, [])
    votes = found["votes"]
    assert votes["all"] > votes["max_discrepancy"] > 0.8 and found["mean_auc"]["as_they_are"] > 0.7
    for rule in found["by_rule"].values():
        assert rule["auc"] > 0.6 and rule["spread"] == pytest.approx(0.05**0.5, abs=0.03)
    assert sum(rule["decides"] for rule in found["by_rule"].values()) == pytest.approx(5)


def test_rules_that_are_silent_repeat_or_never_decide_are_named(written):
    d, truth = reading()
    d[:, 1] = d[:, 0]
    d[:, 2] = -0.9 * d[:, 0]
    d[:, 3] *= 0.01
    scores = made(d)
    scores.relevance[:, 4] = 0.01
    scores.label_mass_a[:, 5] = scores.label_mass_b[:, 5] = 0.01
    scores.relevance[:, 6] = 0.3
    found = check_scores(written(scores, prefers=truth), pool_of())
    assert found["no_opinion"] == {
        "r3": "differences below 0.016",
        "r4": "relevance below 0.1",
        "r5": "label mass below 0.1",
    }
    assert {rule: (other, round(r, 1)) for rule, (other, r) in found["repeats"].items()} == {
        "r1": ("r0", 1.0),
        "r2": ("r0", -1.0),
    }
    assert found["never_decide"] == ["r6"]
    silent, again, never = found["warnings"]
    assert silent.startswith("no opinion on nearly all pairs by 3 of 8 rules: r3, r4, r5;")
    assert again.startswith("another rule says the same as 2 of 8 rules: r1 = r0 (+1.00), r2 = r0 (-1.00);")
    assert never == "max-discrepancy never selects 1 of 8 rules: r6"


def test_a_judge_who_prefers_the_longer_response_is_flagged(written):
    rng = np.random.default_rng(0)
    d, _ = reading()
    longer = rng.integers(-40, 41, PAIRS)
    scores = made(d + 0.01 * longer[:, None])
    found = check_scores(written(scores, longer=longer), pool_of())
    mean = (scores.a - scores.b).mean(axis=1)
    expected = (mean * longer).sum() / np.sqrt((mean**2).sum() * (longer**2.0).sum())
    assert found["length_correlation"] == pytest.approx(expected, abs=1e-5) and expected > 0.8
    assert any(line.startswith("the judge prefers the longer response") for line in found["warnings"])
    assert (found["people"], found["votes"], found["mean_auc"]) == (0, {}, {})


def test_nothing_depends_on_which_response_is_a_or_on_the_size_of_batches(written, monkeypatch):
    d, truth = reading()
    scores = made(d)
    longer = np.random.default_rng(0).integers(-40, 41, PAIRS)
    found = check_scores(written(scores, truth, longer), pool_of())
    swapped = replace(scores, a=scores.b, b=scores.a)
    assert check_scores(written(swapped, -truth, -longer, name="swapped"), pool_of()) == found
    monkeypatch.setattr("adaptrm.data.scores.BATCH_ROWS", 32)
    again = check_scores(written(scores, truth, longer), pool_of())
    assert again.pop("by_rule")["r3"] == pytest.approx(found["by_rule"]["r3"])
    assert again["first_direction"] == pytest.approx(found["first_direction"]) and again["votes"] == found["votes"]


def test_areas_and_agreement_are_those_of_all_pairs_in_both_orders():
    rng = np.random.default_rng(0)
    e = rng.integers(-30, 50, (60, 2)) / STEPS
    e[:10] = 0
    sums = Sums(2)
    prefers = rng.choice([-1.0, 1.0], 60)
    a = (e * prefers[:, None]).astype(np.float32)
    sums.add_preferred(a[:25], 0 * a[:25], prefers[:25])
    sums.add_preferred(a[25:], 0 * a[25:], prefers[25:])
    total = e[:, None] + e[None]
    expected = ((total > 0) + (total == 0) / 2).mean(axis=(0, 1))
    np.testing.assert_allclose(auc(sums.histograms[0]), expected, atol=1e-12)
    np.testing.assert_allclose(agreement(sums.histograms[0]), ((e > 0) + (e == 0) / 2).mean(axis=0), atol=1e-12)
    assert sums.said == 60 and (sums.histograms.sum(axis=2) == 60).all()
    # Of two rules, what is left after centring is each other's opposite.
    np.testing.assert_array_equal(sums.histograms[1][0], sums.histograms[1][1][::-1])


def test_the_same_answer_to_rules_for_and_against_a_response(written):
    signs = np.array([1, 1, 1, -1, -1])
    assert same_answer(np.ones(5), signs) == 0  # good is good to all: Yes to the first, No to the others
    assert same_answer(signs * 1.0, signs) == 1
    assert same_answer(-signs * 1.0, signs) == 1
    assert same_answer(np.ones(5), abs(signs)) is None
    d, _ = one_factor()
    against = (1, 4, 6)
    d[:, against] *= -1  # the same Yes, read against the response
    pool = pool_of(against=against)
    found = check_scores(written(made(d), pool=pool), pool)
    assert found["same_answer"] > 0.99
    assert "its first direction is Yes, or No, to rules for and rules against a response at once" in found["warnings"]


def test_a_vote_that_chance_could_give_is_no_agreement(written):
    d, _ = reading()
    prefers = np.random.default_rng(9).choice([-1.0, 1.0], PAIRS)
    (line,) = check_scores(written(made(d), prefers=prefers), pool_of())["warnings"]
    assert line.startswith("its vote cannot be told from chance: it agrees with people on ")
    assert line.endswith(" % of 300 pairs")


def test_few_pairs_and_scores_of_another_pool(written):
    d, _ = one_factor()
    folder = written(made(d[: FEW - 1]))
    (line,) = check_scores(folder, pool_of())["warnings"]
    assert line.startswith("9 pairs are too few")
    changed = RulePool("made", "1", (*pool_of().rules[:-1], Rule("r7", "c", "The response is another.")))
    for pool in (changed, pool_of(5)):
        assert "was not scored with pool made as it is" in refused(check_scores, folder, pool)
        assert "was not scored with pool made as it is" in refused(reduce_pool, pool, folder, 2, f"{folder}.yaml")
    assert not paths.exists(f"{folder}.yaml")
    Path(f"{folder}.jsonl").rename(f"{folder}.moved")
    assert "give --pairs with where it lies now" in refused(check_scores, folder, pool_of())


def test_what_is_said_without_a_response(written):
    d, _ = reading()
    scores = made(d)
    scores.a[:] += 0.3
    scores.b[:] += 0.3
    folder = written(scores)
    assert "said_of_nothing" not in check_scores(folder, pool_of())
    control = np.full((4, RULES), 0.3, np.float32)
    control[:, 2], control[:, 5] = 0, -0.3
    write_control(folder, ["p0", "p1", "p2", "p3"], control)
    found = check_scores(folder, pool_of())
    shares = [rule["said_of_nothing"] for rule in found["by_rule"].values()]
    both = np.concatenate([scores.a, scores.b]).astype(np.float64)
    expected = 1 - np.square(both - control[0]).mean(axis=0) / np.square(both).mean(axis=0)
    np.testing.assert_allclose(shares, np.maximum(expected, 0), atol=1e-6)
    assert shares[2] == shares[5] == 0 and min(shares[:2]) > 0.5
    assert found["said_of_nothing"] == pytest.approx(np.mean(shares)) and found["warnings"] == []
    sure = replace(scores, a=scores.a * 0 + 0.3, b=scores.b * 0 + 0.31)
    folder = written(sure, name="sure")
    write_control(folder, ["p0"], control[:1] * 0 + 0.3)
    said = "100 % of what the judge says of responses it says of an empty one too"
    assert said in check_scores(folder, pool_of())["warnings"]


def information(products: np.ndarray, chosen) -> float:
    noise = 0.1 * np.trace(products) / len(products)
    inner = products[np.ix_(chosen, chosen)]
    return np.linalg.slogdet(np.eye(len(chosen)) + inner / noise)[1] / 2 / np.log(2)


@pytest.mark.parametrize("seed", range(4))
def test_the_greedy_search_against_all_subsets(seed):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((40, 7)) @ rng.standard_normal((7, 7))
    products = mixed.T @ mixed
    added = most_informative(products, 7)
    chosen: list[int] = []
    for one in added:  # each is the best beside those before it
        gains = [information(products, [*chosen, rule]) for rule in range(7) if rule not in chosen]
        assert information(products, [*chosen, one.rule]) == pytest.approx(max(gains))
        assert one.bits == pytest.approx(max(gains) - information(products, chosen) if chosen else max(gains))
        chosen.append(one.rule)
        best = max(information(products, list(s)) for s in combinations(range(7), len(chosen)))
        assert (1 - 1 / np.e) * best <= information(products, chosen) <= best + 1e-9
    assert sorted(chosen) == list(range(7)) and 0.9 < added[-1].explained < 1


def test_repeated_and_silent_rules_go_first(written, tmp_path):
    d, _ = reading()
    d[:, 4] = 0.98 * d[:, 0]
    d[:, 5] *= 0.01
    scores = made(d)
    folder, out = written(scores), tmp_path / "smaller.yaml"
    found = reduce_pool(pool_of(), folder, 6, out)
    assert set(found["added"]) == {"r0", "r1", "r2", "r3", "r6", "r7"}
    bits = [one["bits"] for one in found["added"].values()]
    assert bits == sorted(bits, reverse=True) and found["explained"] > 0.85
    products = (scores.a - scores.b).astype(np.float64).T @ (scores.a - scores.b)
    best = max(combinations(range(RULES), 6), key=lambda chosen: information(products, list(chosen)))
    assert {f"r{i}" for i in best} == set(found["added"])
    smaller = RulePool.load(out)
    assert (smaller.ids, smaller.hash, smaller.name) == (("r0", "r1", "r2", "r3", "r6", "r7"), found["hash"], "made-6")
    assert [rule.text for rule in smaller] == [rule.text for rule in pool_of() if rule.id in smaller.ids]
    for k in (0, 9):
        assert "give 1 to 8" in refused(reduce_pool, pool_of(), folder, k, out)
    scores.a[1, 2] = np.nan
    assert "the scores of pair 'p1' are not all" in refused(reduce_pool, pool_of(), written(scores, name="nan"), 2, out)


def test_a_judge_who_never_tells_two_responses_apart(written):
    found = check_scores(written(made(np.zeros((20, 3)))), pool_of(3))
    assert (found["first_direction"], found["length_correlation"]) == (0, 0)
    assert found["no_opinion"].keys() == {"r0", "r1", "r2"}
    added = most_informative(np.zeros((3, 3)), 2)
    assert [tuple(one) for one in added] == [(0, 0, 0), (1, 0, 0)]


def test_rules_check_and_reduce_as_commands(monkeypatch, capsys, written, tmp_path):
    d, factor = one_factor()
    folder, pool, out = written(made(d), prefers=np.sign(factor)), tmp_path / "pool.yaml", tmp_path / "out.yaml"
    pool.write_text(pool_of().to_yaml())
    code, printed, err = in_process(monkeypatch, capsys, "rules", "check", pool, "--scores", folder)
    lines = printed.splitlines()
    assert (code, err) == (0, "")
    assert any(line.startswith(f"{folder}: one direction carries") for line in lines)
    assert any("first direction" in line and "% of the variance" in line for line in lines)
    shown = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert len(shown["r7"]) == 1 + 7 + 2 and shown["rule"][1:3] == ["spread", "decides"]
    code, printed, err = in_process(monkeypatch, capsys, "rules", "check", pool, "--scores", folder, "--json")
    assert (code, err) == (0, "") and json.loads(printed)["judge"] == check_scores(folder, pool_of())
    code, _, err = in_process(monkeypatch, capsys, "rules", "check", pool, "--pairs", folder)
    assert code == 2 and err.startswith("adaptrm: --pairs goes with --scores")
    reduce = ("rules", "reduce", pool, "--scores", folder, "--k", "3", "--out", out)
    code, printed, err = in_process(monkeypatch, capsys, *reduce)
    assert (code, err) == (0, "") and len(RulePool.load(out)) == 3 and "bits" in printed
    code, printed, err = in_process(monkeypatch, capsys, *reduce, "--json")
    assert json.loads(printed)["added"].keys() == set(RulePool.load(out).ids)


def test_label_says_what_nobody_should_train_on_without_knowing(written, tmp_path, capsys):
    d, factor = one_factor()
    job = LabelJob(written(made(d), prefers=np.sign(factor)), str(tmp_path / "labels.jsonl"))
    found, checked = label(job), check_scores(job.scores, pool_of())
    assert found["first_direction"] == checked["first_direction"] and found["length_correlation"] == 0
    assert capsys.readouterr().err == f"{job.scores}: {checked['warnings'][0]}\n"
    d, _ = reading()
    assert label(replace(job, scores=written(made(d), name="reading")))["first_direction"] < ONE_DIRECTION
    assert capsys.readouterr().err == ""
