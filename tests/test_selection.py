"""``select`` against a NumPy reference written from METHOD.md section 1 and the contract, and its symmetries."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import adaptrm
from adaptrm.selection import STRATEGIES, EvidenceWeights, select
from adaptrm.selection.top_rules import TILE

PAIRS, RULES, K = 50_000, 20, 5
FIXED = [7, 0, 19, 3, 12]
# Of the hypothesis tests, so that they compile once.
SMALL, SMALL_K = (7, 6), 3
WEIGHTS = (0.5, 0.3, 0.7)


def scores(levels: int | None, pairs: int = PAIRS, rules: int = RULES, seed: int = 0) -> tuple[np.ndarray, ...]:
    """a, b, relevance; with levels only so many values occur, and most rows hold ties."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(-1, 1, (2, pairs, rules)).astype(np.float32)
    relevance = rng.uniform(0, 1, (pairs, rules)).astype(np.float32)
    if levels is None:
        return a, b, relevance
    quantised = [np.round(x * levels) / np.float32(levels) for x in (a, b, relevance)]
    return tuple(x.astype(np.float32) for x in quantised)


def reference(a, b, relevance, strategy="max-discrepancy", k=K, weight=0.5, rules=None, dtype=np.float32):
    """The operations of the contract one by one, each rounded to ``dtype``."""
    a, b, relevance = (x.astype(dtype) for x in (a, b, relevance))
    difference = a - b
    if strategy == "fixed":
        chosen = np.tile(np.asarray(rules), (len(a), 1))
    else:
        weighted = dtype(weight) * np.abs(difference)
        score = relevance if strategy == "relevance" else relevance + weighted
        k = a.shape[1] if strategy == "all" else k
        chosen = np.argsort(-score, axis=1, kind="stable")[:, :k]
    margin = np.zeros(len(a), dtype)
    for picked in np.take_along_axis(difference, chosen, axis=1).T:
        margin = margin + picked
    return chosen, margin


@pytest.mark.parametrize("levels", [None, 4], ids=["random", "ties"])
@pytest.mark.parametrize(
    ("strategy", "weight"),
    [*(("max-discrepancy", w) for w in WEIGHTS), ("all", 0.3), ("relevance", 0.5), ("fixed", 0.5)],
)
def test_equals_the_reference(strategy, weight, levels):
    a, b, relevance = scores(levels)
    rules = FIXED if strategy == "fixed" else None
    got = select(a, b, relevance, strategy, K, weight, rules)
    chosen, margin = reference(a, b, relevance, strategy, K, weight, rules)
    assert np.array_equal(got.rules, chosen)
    assert np.array_equal(got.margin, margin)
    assert np.array_equal(got.preferred, np.sign(margin))
    assert np.array_equal(got.probability, np.select([margin > 0, margin < 0], [1, 0], 0.5))
    assert [x.dtype for x in (got.rules, got.preferred, got.margin, got.probability)] == ["i4", "i1", "f4", "f4"]
    assert all(isinstance(x, np.ndarray) for x in (got.rules, got.preferred, got.margin, got.probability))
    if levels is not None and strategy != "all":
        assert (margin == 0).sum() > 100  # the case is about ties: there must be some


def mixed_scores(pairs: int, rules: int, seed: int) -> tuple[np.ndarray, ...]:
    """Row by row: any values, few values, one value, zeros of either sign, the extremes."""
    rng = np.random.default_rng(seed)
    a, b, relevance = (x.copy() for x in scores(None, pairs, rules, seed))
    kind = rng.integers(0, 5, pairs)
    for x, low in ((a, -1), (b, -1), (relevance, 0)):
        few = rng.choice(np.float32([low, 0, 0.25, 1]), x.shape)
        x[kind == 1] = few[kind == 1]
        x[kind == 2] = few[kind == 2, :1]
        x[kind == 3] = np.float32(0) * rng.choice(np.float32([-1, 1]), x.shape)[kind == 3]
        x[kind == 4] = rng.choice(np.float32([low, 1]), x.shape)[kind == 4]
    return a, b, relevance


# Pairs that fill no tile, one, one and a bit, some; rules and k of one block, of several, of more than networks take.
@pytest.mark.parametrize(
    ("strategy", "pairs", "rules", "k"),
    [
        ("max-discrepancy", TILE - 1, 9, 2),
        ("max-discrepancy", TILE, 1, 1),
        ("max-discrepancy", TILE + 1, 6, 6),
        ("max-discrepancy", 2 * TILE, 33, 3),
        ("max-discrepancy", TILE + 7, 100, 5),
        ("relevance", TILE + 7, 100, 5),
        ("max-discrepancy", TILE, 130, 6),
        ("max-discrepancy", TILE, 40, 9),
    ],
)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), weight=st.sampled_from([0.0, 0.3, 0.5, -0.7, 3e38]))
def test_tiles_equal_the_reference(strategy, pairs, rules, k, seed, weight):
    a, b, relevance = mixed_scores(pairs, rules, seed)
    got = select(a, b, relevance, strategy, k, weight)
    with np.errstate(over="ignore"):
        chosen, margin = reference(a, b, relevance, strategy, k, weight)
    assert np.array_equal(got.rules, chosen)
    assert np.array_equal(got.margin, margin)


@pytest.mark.parametrize(("strategy", "rules"), [("max-discrepancy", 6), ("max-discrepancy", 40), ("fixed", 6)])
def test_a_score_out_of_range_is_found_in_any_tile(strategy, rules):
    for name, value in (("a", np.nan), ("b", 1.5), ("relevance", -1e-30)):
        given = dict(zip(("a", "b", "relevance"), scores(None, TILE + 5, rules), strict=True))
        given[name][TILE + 3, 4] = value
        with pytest.raises(ValueError, match=rf"^{name} of row {TILE + 3}, rule 4, is"):
            select(**given, strategy=strategy, k=SMALL_K, rules=[1, 2, 0] if strategy == "fixed" else None)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_float64_agrees_where_gaps_are_wide(weight):
    a, b, relevance = scores(None, seed=1)
    got = select(a, b, relevance, k=K, discrepancy_weight=weight)
    exact, margin = reference(a, b, relevance, k=K, weight=weight, dtype=np.float64)
    score = relevance.astype(np.float64) + weight * np.abs(a.astype(np.float64) - b)
    gaps = -np.diff(-np.sort(-score, axis=1), axis=1)[:, :K]
    wide = (gaps > 1e-6).all(axis=1)
    assert wide.mean() > 0.99
    assert np.array_equal(got.rules[wide], exact[wide])
    assert np.abs(got.margin - margin)[wide].max() < 1e-5
    decided = wide & (np.abs(margin) > 1e-5)
    assert np.array_equal(got.preferred[decided], np.sign(margin[decided]))


# In a process with XLA's own optimisation level, which users have and these tests do not: only there may product and
# sum be contracted into one fused operation, which orders near-ties differently.
AS_USERS_RUN_IT = """
import json, sys
import numpy as np
import adaptrm.selection, adaptrm.prefix_tree
loaded = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[3].split(",")))
stored = np.load(sys.argv[1])
found = {}
for weight in json.loads(sys.argv[2]):
    got = adaptrm.selection.select(stored["a"], stored["b"], stored["relevance"], discrepancy_weight=weight)
    found[f"rules {weight}"], found[f"margin {weight}"] = got.rules, got.margin
np.savez(sys.argv[1], **found)
print(json.dumps(loaded))
"""
HEAVY = ("transformers", "flax", "orbax", "datasets", "grain", "pyarrow", "torch", "optax", "pydantic", "fsspec")


def test_compiled_for_users_it_equals_the_reference_and_needs_jax_alone(tmp_path):
    # Every value close to every other: differently rounded scores change places in thousands of rows.
    rng = np.random.default_rng(2)
    a, b = rng.uniform(-1, 1, (2, PAIRS, 2 * RULES)).astype(np.float32)  # two blocks of a network
    relevance = np.clip(1 - np.abs(a - b) * np.float32(0.3), 0, 1).astype(np.float32)
    file = tmp_path / "scores.npz"
    np.savez(file, a=a, b=b, relevance=relevance)
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(adaptrm.__file__).parent.parent)}
    command = [sys.executable, "-c", AS_USERS_RUN_IT, str(file), json.dumps(WEIGHTS), ",".join(HEAVY)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []
    found = np.load(file)
    for weight in WEIGHTS:
        chosen, margin = reference(a, b, relevance, weight=weight)
        assert np.array_equal(found[f"rules {weight}"], chosen)
        assert np.array_equal(found[f"margin {weight}"], margin)


def test_selection_and_prefix_tree_import_numpy_and_jax_alone():
    root = Path(adaptrm.__file__).parent
    for package in ("selection", "prefix_tree"):
        allowed = {"numpy", "jax", "jaxtyping", *sys.stdlib_module_names}
        for file in sorted((root / package).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{file.name}: relative imports hide where a name comes from"
                    modules = [node.module]
                else:
                    continue
                for module in modules:
                    own = module == f"adaptrm.{package}" or module.startswith(f"adaptrm.{package}.")
                    assert own or module.split(".")[0] in allowed, f"{file.name} imports {module}"


def test_a_tie_is_a_tie():
    a = np.full(SMALL, 0.3, np.float32)
    b = a.copy()
    # One rule each way, by the same amount: 0.1 - 0.7 and 0.7 - 0.1 cancel exactly.
    a[1, :2], b[1, :2] = (0.1, 0.7), (0.7, 0.1)
    got = select(a, b, np.full(SMALL, 0.5, np.float32), k=SMALL_K)
    assert got.margin.tolist() == [0.0] * len(a)
    assert got.preferred.tolist() == [0] * len(a)
    assert got.probability.tolist() == [0.5] * len(a)
    assert got.rules.tolist() == [[0, 1, 2]] * len(a)


def test_the_sign_of_zero_breaks_no_tie():
    a = np.zeros(SMALL, np.float32)
    relevance = np.zeros(SMALL, np.float32)
    relevance[0, ::2] = relevance[1, 1::2] = -0.0
    for strategy in ("relevance", "max-discrepancy"):
        assert select(a, a, relevance, strategy, SMALL_K).rules.tolist() == [[0, 1, 2]] * len(a)


def floats(low: int) -> st.SearchStrategy:
    """Any float32 in range, and often one of few values, so that ties come up."""
    few = st.sampled_from([low, 0, 0.25, 0.5, 1])
    return arrays(np.float32, SMALL, elements=few | st.floats(low, 1, width=32), fill=few)


COVARIANCE = np.eye(6) + 0.3 * np.outer(*[[1, -1, 0.5, 0, 2, 1]] * 2)
EVIDENCE = EvidenceWeights(np.float32([0.3, -0.1, 0.2, 0, 0.5, 0.1]), COVARIANCE.astype(np.float32))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(a=floats(-1), b=floats(-1), relevance=floats(0), seed=st.integers(0, 3))
def test_swapping_the_responses_negates_the_label(strategy, a, b, relevance, seed):
    options = {"k": SMALL_K, "seed": seed, "rules": [4, 1, 2] if strategy == "fixed" else None}
    options["weights"] = EVIDENCE if strategy == "evidence" else None
    one = select(a, b, relevance, strategy, **options)
    other = select(b, a, relevance, strategy, **options)
    assert np.array_equal(one.rules, other.rules)
    assert np.array_equal(one.margin, -other.margin)
    assert np.array_equal(one.preferred, -other.preferred)
    assert np.array_equal(one.probability, 1 - other.probability)


@pytest.mark.parametrize("strategy", ["max-discrepancy", "relevance", "all"])
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(SMALL[1])))
def test_the_order_of_the_rules_does_not_matter(strategy, seed, order):
    # Random values, as drawn ones nearly always tie: equivariance is claimed for rows without ties alone.
    a, b, relevance = scores(None, *SMALL, seed)
    plain = select(a, b, relevance, strategy, SMALL_K)
    moved = select(a[:, order], b[:, order], relevance[:, order], strategy, SMALL_K)
    score = relevance if strategy == "relevance" else relevance + np.float32(0.5) * np.abs(a - b)
    distinct = np.array([len(set(row)) == len(row) for row in score.tolist()])
    assert distinct.any()
    assert np.array_equal(np.asarray(order)[moved.rules][distinct], plain.rules[distinct])
    assert np.array_equal(moved.margin[distinct], plain.margin[distinct])


def test_random_rules_depend_on_seed_and_row_alone():
    a, b, relevance = scores(None, 64, 6)
    whole = select(a, b, relevance, "random", SMALL_K, seed=5)
    assert (np.diff(whole.rules, axis=1) > 0).all()  # ascending, so distinct
    assert whole.rules.min() >= 0 and whole.rules.max() < 6
    for start in (0, 32):
        part = slice(start, start + 32)
        got = select(a[part], b[part], relevance[part], "random", SMALL_K, seed=5, first_row=start)
        assert np.array_equal(got.rules, whole.rules[part])
        assert np.array_equal(got.margin, whole.margin[part])
    assert np.array_equal(select(b, a, 1 - relevance, "random", SMALL_K, seed=5).rules, whole.rules)
    assert not np.array_equal(select(a, b, relevance, "random", SMALL_K, seed=6).rules, whole.rules)
    assert len({tuple(row) for row in whole.rules.tolist()}) > 10  # of 20 ways to pick 3 of 6
    assert (np.bincount(whole.rules.ravel(), minlength=6) > 64 / 6).all()
    difference = np.take_along_axis(a - b, whole.rules, axis=1)
    assert np.array_equal(whole.margin, difference[:, 0] + difference[:, 1] + difference[:, 2])


def test_large_seeds_are_seeds():
    a, b, relevance = scores(None, 64, 6)
    one, other = (select(a, b, relevance, "random", SMALL_K, seed=s).rules for s in (2**31, 2**40 + 1))
    assert not np.array_equal(one, other)


def test_fixed_rules_come_in_the_order_given():
    a, b, relevance = scores(None, *SMALL)
    got = select(a, b, relevance, "fixed", k=1, rules=(4, 1, 2))
    assert got.rules.tolist() == [[4, 1, 2]] * len(a)
    d = a - b
    assert np.array_equal(got.margin, d[:, 4] + d[:, 1] + d[:, 2])


def test_all_takes_every_rule_whatever_k():
    a, b, relevance = scores(None, *SMALL)
    for k in (1, 500):
        got = select(a, b, relevance, "all", k=k)
        assert np.sort(got.rules, axis=1).tolist() == [list(range(SMALL[1]))] * len(a)


def test_no_pairs_give_no_labels():
    got = select(*(x[:0] for x in scores(None, *SMALL)), k=SMALL_K)
    assert (got.rules.shape, got.preferred.shape, got.margin.shape, got.probability.shape) == ((0, 3), (0,), (0,), (0,))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.0001, -1.0001])
@pytest.mark.parametrize("name", ["a", "b", "relevance"])
def test_a_score_out_of_range_names_its_pair(name, value):
    given = dict(zip(("a", "b", "relevance"), scores(None, *SMALL), strict=True))
    given[name][5, 2] = value
    low = 0 if name == "relevance" else -1
    with pytest.raises(ValueError, match=rf"^{name} of row 105, rule 2, is .*\[{low}, 1\]$"):
        select(**given, k=SMALL_K, first_row=100)
    with pytest.raises(ValueError, match=rf"^{name} of pair 'p5', rule 2, is"):
        select(**given, k=SMALL_K, ids=[f"p{i}" for i in range(7)])


def test_negative_relevance_is_an_error_and_bounds_are_not():
    a, b, relevance = scores(None, *SMALL)
    a[:], b[:], relevance[:] = 1, -1, 1
    assert select(a, b, relevance, k=SMALL_K).margin.tolist() == [6.0] * len(a)
    relevance[0, 0] = -0.001
    with pytest.raises(ValueError, match="relevance of row 0, rule 0"):
        select(a, b, relevance, k=SMALL_K)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0; with 6 rules it must be 1 to 6"),
        ({"k": 7}, "k is 7"),
        ({"strategy": "max_discrepancy"}, "strategy 'max_discrepancy' is unknown; known: max-discrepancy, evidence"),
        ({"strategy": "fixed"}, "needs distinct rules"),
        ({"strategy": "fixed", "rules": []}, "needs distinct rules"),
        ({"strategy": "fixed", "rules": [1, 1]}, "needs distinct rules"),
        ({"strategy": "fixed", "rules": [6]}, "between 0 and 5"),
        ({"strategy": "fixed", "rules": [-1]}, "between 0 and 5"),
        ({"strategy": "fixed", "rules": [[1]]}, "needs distinct rules"),
        ({"strategy": "random", "rules": [1]}, "takes no rules"),
        ({"strategy": "all", "rules": [1]}, "takes no rules"),
        ({"weights": np.ones(6)}, "takes no weights"),
        ({"discrepancy_weight": float("nan")}, "discrepancy_weight is nan"),
        ({"discrepancy_weight": float("inf")}, "discrepancy_weight is inf"),
        ({"a": np.zeros((7, 5))}, r"\[pairs, rules\]"),
        ({"a": np.zeros(6), "b": np.zeros(6), "relevance": np.zeros(6)}, r"\[pairs, rules\]"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    given = dict(zip(("a", "b", "relevance"), scores(None, *SMALL), strict=True)) | {"k": SMALL_K}
    with pytest.raises(ValueError, match=message):
        select(**(given | arguments))
