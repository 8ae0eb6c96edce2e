"""How far a training set and an evaluation suite overlap: counts for a file, a model card and people."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adaptrm import paths
from adaptrm.data.overlap import KINDS, MOST, WORDS, Row, SuiteTexts, blocks, ngrams_of, read_texts, words_of
from adaptrm.data.rows import BadRows, OnBadRow, Source
from adaptrm.errors import InputError, printable
from adaptrm.progress import progress, say

EXAMPLES = 5  # of each kind
COLUMNS = {
    "suite_rows": "rows",
    "suite_rows_overlapping": "overlap",
    "exact_prompts": "prompt",
    "ngrams_in_prompt": "in prompt",
    "ngrams_in_response": "in response",
    "train_rows_overlapping": "training",
}
CAPTION = (
    f"Rows of the suite that overlap with the training set: by the whole prompt, or by {WORDS} words in a row in their "
    f"prompt or a response, unless more than {MOST} conversations have them. training: its rows that overlap."
)
Reader = Callable[[Source, BadRows], Iterable[Row]]


def overlap_report(
    train: Source,
    suite: Source,
    out: str | os.PathLike | None = None,
    read: Reader = read_texts,
    on_bad_row: OnBadRow = "fail",
) -> dict[str, Any]:
    """Count the rows that overlap, as ``data.overlap`` says; memory depends on the suite alone.

    Args:
        train: pairs, sets or labels; read twice, the first time for what is common.
        suite: what ``read`` takes, by default pairs or sets.
        out: ``FILE.json``, where the result is written too.
        on_bad_row: of both.

    Returns:
        ``train`` and ``suite``: what they are called. ``train_rows``, ``suite_rows``; how many of them overlap,
        ``train_rows_overlapping``, ``suite_rows_overlapping``, and as shares ``train_share``, ``suite_share``. How many
        rows of the suite have a prompt of the training set (``exact_prompts``), and a 13-gram of it (``ngrams``): in
        their prompt (``ngrams_in_prompt``), in a response (``ngrams_in_response``). ``common_ngrams``: 13-grams of both
        that were too common to count. ``skipped_rows``: of both. ``subsets``: of each subset the same counts of its
        rows, and of the training rows that overlap with them. ``examples``: up to five of each kind, the ids of both
        rows, and words that they share.

    Raises:
        InputError: one of them cannot be read or is empty, ``train`` can be read only once, or ``out`` is no JSON file.
    """
    names = [str(source) if _is_path(source) else name for name, source in (("train", train), ("suite", suite))]
    if out is not None:
        if not str(out).endswith(".json"):
            raise InputError(f"{out}: results are JSON; give --out FILE.json")
        for name in names:
            paths.check_apart(out, name)
    if not _is_path(train) and iter(train) is train:
        raise InputError("train: is read twice; give a file, a list or a set of datasets")
    bad = BadRows(on_bad_row)
    texts = SuiteTexts(read(suite, bad))
    say(f"{names[1]}: {len(texts.ids)} rows; reading {names[0]} twice, the first time for what is common")
    train_rows = texts.count(read_texts(train, bad))
    for name, rows in zip(names, (train_rows, len(texts.ids)), strict=True):
        if not rows:
            raise InputError(f"{name}: has no rows; there is nothing to compare")
    overlaps = _Overlaps(texts)
    with progress("overlap", "rows", train_rows) as shown:
        for block in blocks(read_texts(train, BadRows(on_bad_row, listed=False))):
            overlaps.add(block)
            shown.advance(len(block))
    counts, subsets = overlaps.counts()
    result = {
        "train": names[0],
        "suite": names[1],
        "train_rows": train_rows,
        **counts,
        "train_share": counts["train_rows_overlapping"] / train_rows,
        "suite_share": counts["suite_rows_overlapping"] / counts["suite_rows"],
        "common_ngrams": int((texts.seen & texts.is_common(np.arange(len(texts.keys)))).sum()),
        "skipped_rows": bad.count,
        "subsets": subsets,
        "examples": overlaps.examples,
    }
    if out is not None:
        paths.write_bytes(out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _is_path(source: Source) -> bool:
    return isinstance(source, str | os.PathLike)


class _Overlaps:
    """Counts rows that overlap, once ``texts`` has counted them, and keeps some as examples."""

    def __init__(self, texts: SuiteTexts):
        self._texts, self._train_rows = texts, 0
        self._subsets, self._subset_of = np.unique(np.array(texts.subsets), return_inverse=True)
        self._train_rows_of = np.zeros(len(self._subsets), np.int64)
        self.examples: list[dict[str, str]] = []

    def add(self, block: Sequence[Row]) -> None:
        number, at = self._texts.find(block)
        rows, kinds, place = self._texts.owners(at)
        self._train_rows += len(np.unique(number))
        _, subset = np.unique(np.stack([number[place], self._subset_of[rows]]), axis=1)
        self._train_rows_of += np.bincount(subset, minlength=len(self._subsets))
        for kind, name in enumerate(KINDS):
            of_kind = np.flatnonzero(kinds == kind)
            _, first = np.unique(number[place[of_kind]], return_index=True)  # one of each training row
            for i in of_kind[first]:
                known = [example["suite"] for example in self.examples if example["kind"] == name]
                if len(known) == EXAMPLES:
                    break
                if (suite := self._texts.ids[rows[i]]) not in known:
                    row, key = block[number[place[i]]], self._texts.keys[at[place[i]]]
                    self.examples.append({"train": row.id, "suite": suite, "kind": name, "words": _shared(row, key)})

    def counts(self) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """Of all rows, and of each subset."""
        seen = np.flatnonzero(self._texts.seen)
        rows, kinds, _ = self._texts.owners(seen[~self._texts.is_common(seen)])
        found = np.zeros((len(KINDS), len(self._texts.ids)), bool)
        found[kinds, rows] = True
        of_subsets = {
            str(name): _counts(found[:, self._subset_of == number], self._train_rows_of[number])
            for number, name in enumerate(self._subsets)
        }
        return _counts(found, self._train_rows), of_subsets


def _counts(found: np.ndarray, train_rows: int) -> dict[str, int]:
    """What is said of rows of a suite, from what the training set has of each, ``[kinds, rows]``."""
    prompt, in_prompt, in_response = found
    counts = {
        "suite_rows": found.shape[1],
        "train_rows_overlapping": train_rows,
        "suite_rows_overlapping": found.any(axis=0).sum(),
        "exact_prompts": prompt.sum(),
        "ngrams": (in_prompt | in_response).sum(),
        "ngrams_in_prompt": in_prompt.sum(),
        "ngrams_in_response": in_response.sum(),
    }
    return {name: int(count) for name, count in counts.items()}


def _shared(row: Row, key: int) -> str:
    """The words of a training row that have a key; where it is its prompt's, the first ones of the last message."""
    for text in (*(message["content"] for message in row.prompt), *row.responses):
        words = words_of(text)
        if len(place := np.flatnonzero(ngrams_of([words])[0] == key)):
            return " ".join(words[place[0] : place[0] + WORDS])
    return " ".join(words_of(row.prompt[-1]["content"])[:WORDS])


def for_people(result: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, examples and, under ``table``, a row for each subset that overlaps."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=CAPTION, caption_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("All rows", *(str(result[column]) for column in COLUMNS))
    for name, counts in result["subsets"].items():
        if counts["suite_rows_overlapping"]:
            table.add_row(Text(printable(name)), *(str(counts[column]) for column in COLUMNS))  # a name is no markup
    shown = {name: result[name] for name in ("train", "suite")}
    for side in ("train", "suite"):
        count, total, share = (result[f"{side}_{what}"] for what in ("rows_overlapping", "rows", "share"))
        shown[f"{side}_rows_overlapping"] = f"{count} of {total} ({100 * share:.1f} %)"
    shown |= {name: result[name] for name in ("common_ngrams", "skipped_rows")}
    examples = {
        f"{one['kind'].replace('_', ' ')}, {one['train']} and {one['suite']}": one["words"]
        for one in result["examples"]
    }
    return shown | ({"examples": examples} if examples else {}) | {"table": table}
