"""Score folders: the same bytes however often the work was interrupted."""

import json
import shutil
import signal

import numpy as np
import pytest
from commands import adaptrm, kill_when, pair_rows, write_rows
from tiny import tiny_causal_lm, tiny_pairs, tiny_pool

from adaptrm.data.scores import LOW_MASS, read_control, read_parts
from adaptrm.errors import RESTART, InputError
from adaptrm.judge import Judge
from adaptrm.judge.program import scores_of
from adaptrm.judge.score import ScoreJob, dry_run, score
from adaptrm.lock import hold
from adaptrm.parallel import read_leaves
from adaptrm.prefix_tree import Node, PrefixTree

PAIRS, PART = 40, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("score")
    tiny_causal_lm(out / "lm")
    (out / "pool.yaml").write_text(tiny_pool().to_yaml())
    write_rows(out / "pairs.jsonl", pair_rows(tiny_pairs(PAIRS)))
    return out


def command(folder, out):
    return (
        *("score", "--pairs", folder / "pairs.jsonl", "--judge", folder / "lm", "--rules", folder / "pool.yaml"),
        *("--out", out, "--part-size", PART),
    )


def job(folder, out, **changes) -> ScoreJob:
    fields = {
        "pairs": str(folder / "pairs.jsonl"),
        "judge": str(folder / "lm"),
        "rules": str(folder / "pool.yaml"),
        "out": str(out),
        "part_size": PART,
    }
    return ScoreJob(**fields | changes)


def contents(out) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def scored(folder):
    done = adaptrm(*command(folder, folder / "scores"), "--json")
    return json.loads(done.stdout)


def test_the_folder_holds_what_the_judge_says(folder, scored, one_device):
    assert scored["pairs"] == PAIRS and scored["parts"] == PAIRS // PART
    assert 0 < scored["label_mass"] <= 1
    pairs = tiny_pairs(PAIRS)
    said = Judge.from_pretrained(folder / "lm", tiny_pool(), mesh=one_device).score(pairs[:PART])
    part = next(read_parts(folder / "scores"))
    assert part.ids == [p.id for p in pairs[:PART]]
    for field in ("a", "b", "relevance", "log_odds_a", "label_mass_b"):
        np.testing.assert_allclose(getattr(part, field), getattr(said, field), atol=1e-5)


def test_pairs_whose_answers_carry_little_mass_are_counted_and_named(folder, scored):
    parts = list(read_parts(folder / "scores"))
    found = [both for p in parts for both in zip(p.ids, p.label_mass_a, p.label_mass_b, strict=True)]
    low = [name for name, a, b in found if np.mean([a, b]) < LOW_MASS]
    assert low, "a judge with random weights rarely answers"
    assert scored["low_mass_pairs"] == len(low) and scored["low_mass_first"] == low[:10]
    entries = np.array([[a, b] for _, a, b in found])
    assert scored["low_mass_share"] == pytest.approx((entries < LOW_MASS).mean())


def test_stopped_and_killed_and_started_again_it_writes_the_same_bytes(folder, scored, tmp_path):
    out = tmp_path / "scores"
    kill_when(lambda: (out / "part-00001.parquet").exists(), *command(folder, out), by=signal.SIGTERM, code=RESTART)
    assert (out / "part-00001.parquet").exists() and not (out / "part-00003.parquet").exists()
    kill_when(lambda: (out / "part-00004.parquet").exists(), *command(folder, out))
    assert len(list(out.glob("part-*.parquet"))) < PAIRS // PART
    with pytest.raises(InputError, match=r"has \d+ of 10 parts; run the same adaptrm score again"):
        list(read_parts(out))
    adaptrm(*command(folder, out))
    assert contents(out) == contents(folder / "scores")


@pytest.mark.parametrize(
    ("field", "change"),
    [("pool_hash", "rules"), ("pairs_sha256", "pairs"), ("dtype", "dtype"), ("part_size", "part_size")],
)
def test_a_folder_takes_scores_of_one_kind_only(folder, scored, tmp_path, field, change):
    (tmp_path / "rules").write_text(tiny_pool(5).to_yaml())
    write_rows(tmp_path / "pairs", pair_rows(tiny_pairs(PAIRS))[::-1])
    value = {"dtype": "bfloat16", "part_size": 8}.get(change, str(tmp_path / change))
    before = contents(folder / "scores")
    with pytest.raises(InputError, match=r"another (pool|rules|count|parts|pairs_sha256|dtype|part_size)"):
        score(job(folder, folder / "scores", **{change: value}))
    assert contents(folder / "scores") == before


def test_a_held_folder_is_refused(folder, tmp_path):
    with hold(tmp_path / "scores"):
        refused = adaptrm(*command(folder, tmp_path / "scores"), check=False)
    assert refused.returncode == 2
    assert "another run holds this folder" in refused.stderr


def test_a_bad_pair_stops_before_anything_is_written(folder, tmp_path):
    rows = pair_rows(tiny_pairs(3))
    rows[2]["response_b"] = ""
    write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match=r"pairs.jsonl: line 3: response_b is empty"):
        score(job(folder, tmp_path / "out", pairs=str(tmp_path / "pairs.jsonl")))
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_dry_run_counts_what_the_run_computes(folder, tmp_path):
    found = dry_run(job(folder, tmp_path / "none"))
    assert found["pairs"] == PAIRS and found["rules"] == len(tiny_pool())
    assert found["tokens"] < found["tokens_one_sequence_a_rule"]
    computed = sum(int(length.split()[0]) * rows for length, rows in found["rows"].items())
    assert found["padding"] == pytest.approx(1 - found["tokens"] / computed)
    assert found["predicted_seconds"] == pytest.approx(computed / found["tokens_per_second"])
    assert not (tmp_path / "none").exists()


def test_an_empty_response_is_asked_about_once_and_changes_no_part(folder, scored, tmp_path, one_device):
    out = tmp_path / "scores"
    shutil.copytree(folder / "scores", out)
    before = contents(out)
    score(job(folder, out, control=6))
    after = contents(out)
    said = after.pop("control.parquet")
    assert after == before
    ids, control = read_control(out, len(tiny_pool()))
    assert ids == [pair.id for pair in tiny_pairs(6)] and control.dtype == np.float32
    judge = Judge.from_pretrained(folder / "lm", tiny_pool(), mesh=one_device)
    prompts = [pair.prompt for pair in tiny_pairs(6)]
    texts = [judge.prompt.text(prompt, "", rule) for prompt in prompts for rule in range(len(tiny_pool()))]
    trees = [PrefixTree.build(Node(ids)) for ids in judge.prompt.chat.encode_many(texts)]
    alone = read_leaves(trees, judge.mesh, judge.program)
    log_p = np.concatenate([alone[i] for i in range(len(trees))]).reshape(6, 1, len(tiny_pool()), 3)
    signs = np.array([rule.sign for rule in tiny_pool()], np.float32)
    np.testing.assert_allclose(control, scores_of(np.repeat(log_p, 2, axis=1), signs)["a"], atol=1e-5)
    (out / "control.parquet").unlink()
    score(job(folder, out, control=6))
    assert (out / "control.parquet").read_bytes() == said
