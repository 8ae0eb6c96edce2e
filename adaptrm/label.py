"""``adaptrm label``: a score folder and its pairs to a label file."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.data.labels import Label, write_labels
from adaptrm.data.preferences import read_pairs
from adaptrm.data.rows import BadRows, source_hash
from adaptrm.data.scores import read_batches, read_manifest
from adaptrm.errors import InputError
from adaptrm.selection import select


@dataclass(frozen=True)
class LabelJob:
    """What ``adaptrm label`` is asked for.

    Attributes:
        pairs: where the pairs lie now; None takes the manifest's word.
        rules: ids for strategy ``fixed``.
    """

    scores: str
    out: str
    pairs: str | None = None
    strategy: str = "max-discrepancy"
    k: int = 5
    discrepancy_weight: float = 0.5
    rules: tuple[str, ...] = ()
    seed: int = 0


def label(job: LabelJob) -> dict[str, Any]:
    """Select rules, label the pairs and write the labels; ties are left out and counted.

    Returns:
        Pairs, labels, ties, agreement with the pairs' own ``preferred`` (None where they have none), the rules that
        decided most often.

    Raises:
        InputError: scores and pairs do not belong together, or an argument is wrong.
    """
    manifest = read_manifest(job.scores)
    source = job.pairs or manifest["pairs"]
    paths.check_apart(job.out, source)
    try:
        found = source_hash(source)
    except InputError as wrong:
        moved = "" if job.pairs else "; it was scored under this name: give --pairs with where it lies now"
        raise InputError(f"{wrong}{moved}") from None
    if found != manifest["pairs_sha256"]:
        raise InputError(
            f"{source}: not the pairs that {job.scores} was made of (SHA-256 {found[:12]}..., there "
            f"{manifest['pairs_sha256'][:12]}...); give --pairs with the file that was scored, or score again"
        )
    rule_ids = list(manifest["rules"])
    if unknown := [rule for rule in job.rules if rule not in rule_ids]:
        raise InputError(f"{job.scores}: has no rule {unknown[0]!r}; its rules are in manifest.json")
    fixed = [rule_ids.index(rule) for rule in job.rules] or None
    counts: Counter[str] = Counter()
    decided = np.zeros(len(rule_ids), np.int64)

    def labels() -> Iterator[Label]:
        # Rows that were skipped when the pairs were scored are skipped again; score listed them.
        bad = BadRows(manifest.get("on_bad_row", "fail"), listed=False)
        lenient = bad.on_bad_row == "skip" and manifest.get("truncate_to") is not None  # some could not be cut so far
        stream, row = read_pairs(source, bad, ids_checked=bad.on_bad_row == "fail"), 0
        for scores in read_batches(job.scores):
            try:
                chosen = select(
                    scores.a,
                    scores.b,
                    scores.relevance,
                    job.strategy,
                    job.k,
                    job.discrepancy_weight,
                    fixed,
                    seed=job.seed,
                    ids=scores.ids,
                    first_row=row,
                )
            except ValueError as wrong:
                raise InputError(f"{job.scores}: {wrong}") from None
            np.add.at(decided, chosen.rules[chosen.preferred != 0], 1)
            said = (chosen.preferred, chosen.rules, chosen.margin, chosen.probability)
            for name, sign, selected, margin, p in zip(scores.ids, *(x.tolist() for x in said), strict=True):
                pair = next(stream, None)
                while lenient and pair is not None and pair.id != name:
                    pair = next(stream, None)
                if pair is None:
                    raise InputError(f"{job.scores}: holds more rows than {source} has pairs; score again")
                if pair.id != name:
                    raise InputError(f"{job.scores}: pair {name!r} is {pair.id!r} in {source}; score again")
                counts["pairs"] += 1
                if sign == 0:
                    counts["ties"] += 1
                    continue
                if pair.preferred is not None:
                    counts["compared"] += 1
                    counts["agree"] += (pair.preferred == "a") == (sign > 0)
                sides = (pair.response_a, pair.response_b)[::sign]
                rules = tuple(rule_ids[rule] for rule in selected)
                yield Label(pair.id, pair.prompt, *sides, rules, abs(margin), max(p, 1 - p))
            row += len(scores.ids)
        if not lenient and next(stream, None) is not None:
            raise InputError(f"{job.scores}: holds fewer rows than {source} has pairs; score again")

    written = write_labels(job.out, labels())
    most = np.argsort(-decided, kind="stable")[:10].tolist()
    return {
        "labels": str(job.out),
        "strategy": job.strategy,
        "pairs": counts["pairs"],
        "labelled": written,
        "ties": counts["ties"],
        "agreement": counts["agree"] / counts["compared"] if counts["compared"] else None,
        "compared": counts["compared"],
        "deciding_rules": {rule_ids[rule]: int(decided[rule]) for rule in most if decided[rule]},
    }
