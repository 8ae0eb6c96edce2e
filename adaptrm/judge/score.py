"""``adaptrm score``: pairs through a judge into a score folder, part by part, resuming by whole parts."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

import adaptrm
from adaptrm import paths
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.scores import Scores, part_name, read_part, write_manifest, write_part
from adaptrm.errors import InputError
from adaptrm.hf.load import resolve_model
from adaptrm.judge.language_model import Judge
from adaptrm.lock import hold
from adaptrm.prefix_tree import choose_row_length
from adaptrm.progress import progress
from adaptrm.rules import RulePool

LOW_MASS = 0.1  # below it the judge was mostly about to say something else than an answer


@dataclass(frozen=True)
class ScoreJob:
    """What ``adaptrm score`` is asked for."""

    pairs: str
    model: str
    rules: str
    out: str
    template: str = "conversation-first"
    dtype: str = "float32"
    part_size: int = 256

    def parts(self) -> Iterator[list[Pair]]:
        """Runs of ``part_size`` pairs."""
        stream = read_pairs(self.pairs)
        while part := list(islice(stream, self.part_size)):
            yield part


def score(job: ScoreJob) -> dict[str, Any]:
    """Score all pairs; what an earlier run finished stays.

    Returns:
        Pairs, rules, mean label mass, share of rows with little of it, special-token strings kept as text.

    Raises:
        InputError: an input cannot be used, or the folder holds scores of something else.
    """
    with hold(job.out):
        pool = RulePool.load(job.rules)
        count = sum(1 for _ in read_pairs(job.pairs))  # every row is checked before the judge is loaded
        if not count:
            raise InputError(f"{job.pairs}: holds no pairs")
        model = resolve_model(job.model)
        judge = Judge.from_pretrained(model, pool, job.template, job.dtype)
        parts = -(-count // job.part_size)
        write_manifest(job.out, _manifest(job, judge, model, count, parts))
        done = set(paths.names(job.out))
        masses, low, special = [], 0, 0
        with progress("score", "pairs", count) as shown:
            for number, pairs in enumerate(job.parts()):
                if part_name(number) in done:
                    scores = read_part(paths.join(job.out, part_name(number)), list(pool.ids))
                    if scores.ids != [pair.id for pair in pairs]:
                        raise InputError(f"{job.out}: {part_name(number)} holds other pairs; delete it and go on")
                else:
                    scores = judge.score(pairs)
                    _check_finite(scores, job)
                    write_part(job.out, number, scores)
                mass = np.stack([scores.label_mass_a, scores.label_mass_b])
                masses.append((float(mass.mean()), len(pairs)))
                low += int((mass < LOW_MASS).sum())
                said = (m["content"] for pair in pairs for m in (*pair.conversation("a"), pair.conversation("b")[-1]))
                special += sum(map(judge.prompt.chat.special_strings, said))
                shown.advance(len(pairs))
    return {
        "scores": str(job.out),
        "pairs": count,
        "rules": len(pool),
        "parts": parts,
        "label_mass": sum(m * n for m, n in masses) / count,
        "low_mass_share": low / (2 * count * len(pool)),
        "special_tokens_kept_as_text": special,
    }


def _check_finite(scores: Scores, job: ScoreJob) -> None:
    good = np.isfinite(scores.a) & np.isfinite(scores.b) & np.isfinite(scores.relevance)
    if not good.all():
        name = scores.ids[int(np.argmin(good.all(axis=1)))]
        raise InputError(f"{job.model}: the scores of pair {name!r} are not finite in {job.dtype}; check its weights")


def dry_run(job: ScoreJob) -> dict[str, Any]:
    """Tokenise everything, time one batch, and predict the rest."""
    pool = RulePool.load(job.rules)
    judge = Judge.from_pretrained(job.model, pool, job.template, job.dtype)
    at_once = judge.mesh.shape["data"] * judge.mesh.shape["fsdp"]
    count = tokens = computed = separate = 0
    shapes: dict[int, int] = {}
    sample = []
    for pairs in job.parts():
        trees, _ = judge.trees(pairs)
        sample = sample or trees
        row_length, rows = choose_row_length([len(tree) for tree in trees], at_once)
        batches = -(-len(rows) // at_once)
        shapes[row_length] = shapes.get(row_length, 0) + batches * at_once
        count += len(pairs)
        tokens += sum(map(len, trees))
        computed += batches * at_once * row_length
        separate += sum(int(tree.positions[leaf]) + 1 for tree in trees for leaf in tree.leaves)
    if not count:
        raise InputError(f"{job.pairs}: holds no pairs")
    sample = sample[: max(1, 4096 // len(sample[0]))]
    judge.read_leaves(sample)  # compiles
    start = time.perf_counter()
    judge.read_leaves(sample)
    seconds = time.perf_counter() - start
    row_length, rows = choose_row_length([len(tree) for tree in sample], at_once)
    rate = -(-len(rows) // at_once) * at_once * row_length / seconds
    return {
        "pairs": count,
        "rules": len(pool),
        "tokens": tokens,
        "tokens_one_sequence_a_rule": separate,
        "padding": 1 - tokens / computed,
        "rows": {f"{length} tokens": rows for length, rows in sorted(shapes.items())},
        "tokens_per_second": rate,
        "predicted_seconds": computed / rate,
    }


def _manifest(job: ScoreJob, judge: Judge, model: Path, count: int, parts: int) -> dict[str, Any]:
    prompt = judge.prompt
    return {
        "pairs": job.pairs,
        "pairs_sha256": paths.sha256(job.pairs),
        "count": count,
        "part_size": job.part_size,
        "parts": parts,
        "pool": judge.rules.name,
        "pool_hash": judge.rules.hash,
        "rules": list(judge.rules.ids),
        "model": job.model,
        "model_sha256": {
            file.name: paths.sha256(file)
            for file in sorted(model.iterdir())
            if file.suffix in (".safetensors", ".json", ".jinja")
        },
        "template": job.template,
        "answer_token_ids": dict(zip(("Yes", "No", "Neither"), map(list, prompt.answers), strict=True)),
        "answer_spellings_skipped": prompt.skipped,
        "dtype": job.dtype,
        "versions": {"adaptrm": adaptrm.__version__, "jax": jax.__version__},
    }
