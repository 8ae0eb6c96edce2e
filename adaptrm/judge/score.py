"""``adaptrm score``: pairs through a judge into a score folder, part by part, resuming by whole parts."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import adaptrm
from adaptrm import paths
from adaptrm.data.preferences import Pair, read_pairs
from adaptrm.data.rows import BadRows, OnBadRow, source_hash
from adaptrm.data.scores import (
    LOW_MASS,
    Scores,
    check_manifest,
    judged,
    part_name,
    read_control,
    read_part,
    write_control,
    write_manifest,
    write_part,
)
from adaptrm.data.truncation import Truncation, usable
from adaptrm.errors import InputError
from adaptrm.judge.chosen import Chooser, token_costs
from adaptrm.judge.language_model import Asked, Judge
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.judge.table import PREFIX, Table
from adaptrm.lock import hold
from adaptrm.parallel import local_mesh
from adaptrm.parallel.distributed import exchanged, gathered, told_to_all
from adaptrm.progress import progress
from adaptrm.rules import RulePool

SAMPLE_TOKENS = 4096  # about as many are computed for a prediction
FLAGGED = 10  # ids of pairs with little label mass in the summary


@dataclass(frozen=True)
class ScoreJob:
    """What ``adaptrm score`` is asked for.

    Attributes:
        judge: a causal language model, or ``table:FILE``.
        columns, value_range: of a table; see ``Table``.
        control: so many pairs' prompts are asked with an empty response too, into ``control.parquet``.
        quantize, tensor: of a model; ``int8`` weights, and how many devices split a layer.
        k: rules a pair, where an adapter chooses them.
        on_bad_row: ``skip`` lists rows that are no pairs and leaves them out.
        truncate_to: tokens of a question, to which longer ones are cut from the left; None cuts nothing, ever.
    """

    pairs: str
    judge: str
    rules: str
    out: str
    template: str = "conversation-first"
    dtype: str = "float32"
    part_size: int = 256
    on_bad_row: OnBadRow = "fail"
    truncate_to: int | None = None
    columns: tuple[str, ...] = ()
    value_range: str = "-1,1"
    quantize: str | None = None
    tensor: int = 1
    control: int = 0
    k: int = 5

    def source(self, pool: RulePool) -> Judge | Table:
        """Where the scores come from."""
        if not self.judge.startswith(PREFIX):
            if self.columns or self.value_range != ScoreJob.value_range:
                raise InputError(f"--columns and --range are for a table (--judge {PREFIX}FILE), not for a model")
            return Judge.from_pretrained(self.judge, pool, self.template, self.dtype, self.mesh(), self.quantize)
        if self.truncate_to is not None:
            raise InputError("--truncate-to is for a model; a table has no tokens to cut")
        if self.quantize is not None or self.tensor != 1:
            raise InputError("--quantize and --tensor are for a model; a table has no weights")
        if self.control:
            raise InputError("--control is for a model; a table cannot be asked about an empty response")
        table = Table(self.judge.removeprefix(PREFIX), pool, self.columns, self.value_range)
        table.check(read_pairs(self.pairs, BadRows(self.on_bad_row, listed=False)))
        return table

    def mesh(self) -> Mesh:
        """The devices of this process: those that split a layer, and the rest over rows."""
        try:
            return local_mesh(self.tensor)
        except ValueError as wrong:
            raise InputError(f"--tensor {self.tensor}: {wrong}") from None

    def truncation(self, source: Judge | Table) -> Truncation:
        """What cuts pairs to ``truncate_to``."""
        length = question_length(source.prompt) if self.truncate_to is not None else lambda pair: 0
        return Truncation(length, self.truncate_to)

    def parts(self, bad: BadRows, cut: Truncation) -> Iterator[list[Pair]]:
        """Runs of ``part_size`` pairs."""
        stream = usable(read_pairs(self.pairs, bad), cut, bad, self.pairs)
        while part := list(islice(stream, self.part_size)):
            yield part


def score(job: ScoreJob, adapter: Chooser | None = None) -> dict[str, Any]:
    """Score all pairs; what an earlier run finished stays.

    Several processes take the parts in turn, each on its own devices, into a folder that all of them see.

    Args:
        adapter: chooses ``job.k`` rules for each pair, and the judge is asked about these alone.

    Returns:
        Pairs, bad rows that were skipped, pairs that were truncated, rules, mean label mass, share of the answers with
        little of it, pairs with little of it on average and which are the first, special-token strings kept as text;
        with an adapter ``token_costs`` too.

    Raises:
        InputError: an input cannot be used, or the folder holds scores of something else.
    """
    number, processes = jax.process_index(), jax.process_count()
    with hold(job.out) if number == 0 else nullcontext():
        pool = RulePool.load(job.rules)
        bad = BadRows(job.on_bad_row, listed=job.truncate_to is None)
        count = sum(1 for _ in read_pairs(job.pairs, bad))  # every row is checked before the judge is loaded
        if not count:
            raise InputError(f"{job.pairs}: holds no pairs")
        _check_adapter(job, pool, adapter)
        source = job.source(pool)
        if job.truncate_to is not None:  # what cannot be cut so far has to be known before anything is written
            bad = BadRows(job.on_bad_row)
            count = sum(map(len, job.parts(bad, job.truncation(source))))
        parts = -(-count // job.part_size)
        manifest = _manifest(job, source, pool, count, parts)
        if adapter is not None:
            manifest |= {"k": job.k, **adapter.describe()}
        with told_to_all(job.out) as first:
            if first:
                write_manifest(job.out, manifest)
        if not first:
            check_manifest(job.out, manifest)
        done = set(paths.names(job.out))
        cut = job.truncation(source)
        # Of each part: mean label mass, pairs, entries of low mass, pairs of low mass, special strings.
        told, flagged = np.zeros((parts, 5)), []

        def is_mine(part: int) -> bool:
            return part % processes == number and part_name(part) not in done

        def asked(part: int, pairs: list[Pair], rules: np.ndarray | None) -> Asked | None:
            return source.ask(pairs, rules) if is_mine(part) and isinstance(source, Judge) else None

        def chosen() -> Iterator[tuple[int, list[Pair], np.ndarray | None]]:
            # Not in the thread that asks: programs of two threads would wait for each other's devices.
            for part, pairs in enumerate(job.parts(BadRows(job.on_bad_row, listed=False), cut)):
                yield part, pairs, None if adapter is None or not is_mine(part) else adapter.predict(pairs, job.k)

        with progress("score", "pairs", count) as shown:
            for (part, pairs, _), questions in _one_ahead(asked, chosen()):
                if part % processes == number:
                    scores = _score_part(job, source, pool, part, pairs, questions, done)
                    mass = np.stack([judged(x, scores.rules) for x in (scores.label_mass_a, scores.label_mass_b)])
                    of_pairs = mass.mean(axis=(0, 2)) < LOW_MASS
                    named = [(part, pair.id) for pair, low in zip(pairs, of_pairs, strict=True) if low]
                    flagged = (flagged + named)[:FLAGGED]
                    special = source.special_strings(pairs) if isinstance(source, Judge) else 0
                    counts = (mass < LOW_MASS).sum(), of_pairs.sum(), special
                    told[part] = float(mass.mean()), len(pairs), *counts
                shown.advance(len(pairs))
        if number == 0 and job.control:
            _score_control(job, source)
        costs = {}
        if number == 0 and adapter is not None:
            first_part = read_part(paths.join(job.out, part_name(0)), list(pool.ids))
            some = next(job.parts(BadRows(job.on_bad_row, listed=False), job.truncation(source)))
            costs = token_costs(source.prompt, adapter, some, first_part.rules)
        told = gathered(told).sum(axis=0)
        in_order = sorted((one for of_one in exchanged(flagged) for one in of_one), key=lambda one: one[0])
    masses, of_pairs, low, low_pairs, special = told.T.tolist()
    return {
        "scores": str(job.out),
        "pairs": count,
        "skipped_rows": bad.count,
        "truncated": cut.count,
        "rules": len(pool),
        "parts": parts,
        "label_mass": sum(m * n for m, n in zip(masses, of_pairs, strict=True)) / count,
        "low_mass_share": sum(low) / (2 * count * (len(pool) if adapter is None else job.k)),
        "low_mass_pairs": int(sum(low_pairs)),
        "low_mass_first": [name for _, name in in_order[:FLAGGED]],
        "special_tokens_kept_as_text": int(sum(special)),
        **costs,
    }


def _check_adapter(job: ScoreJob, pool: RulePool, adapter: Chooser | None) -> None:
    """Raise where an adapter cannot choose for a job."""
    if adapter is None:
        return
    if job.judge.startswith(PREFIX):
        raise InputError("--adapter is for a model; a table has the scores of all rules already")
    if job.control:
        raise InputError("--control asks about all rules, and --adapter about few; leave one of them out")
    if adapter.rule_ids != pool.ids:
        raise InputError(f"{job.rules}: has other rules than the adapter's {len(adapter.rule_ids)}; give its pool")
    if not 1 <= job.k <= len(pool):
        raise InputError(f"--k {job.k}: pool {pool.name} has {len(pool)} rules; give 1 to {len(pool)}")


def _one_ahead(function: Callable[..., Any], items: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
    """Each item with the function's result, the next one's made by a thread while the caller works with this one."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[tuple[tuple, Future]] = deque()
        for item in items:
            coming.append((item, thread.submit(function, *item)))
            if len(coming) > 1:
                item, result = coming.popleft()
                yield item, result.result()
        for item, result in coming:
            yield item, result.result()


def _score_part(
    job: ScoreJob,
    source: Judge | Table,
    pool: RulePool,
    part: int,
    pairs: list[Pair],
    questions: Asked | None,
    done: set[str],
) -> Scores:
    """The scores of a part: read where an earlier run finished it, else made and written."""
    if part_name(part) in done:
        scores = read_part(paths.join(job.out, part_name(part)), list(pool.ids))
        if scores.ids != [pair.id for pair in pairs]:
            raise InputError(f"{job.out}: {part_name(part)} holds other pairs; delete it and go on")
        return scores
    scores = source.score(pairs) if questions is None else source.answer(questions)
    _check_finite(scores, job)
    write_part(job.out, part, scores)
    return scores


def _score_control(job: ScoreJob, judge: Judge) -> None:
    """Ask about an empty response to the first prompts, where an earlier run has not: no part depends on it."""
    parts = job.parts(BadRows(job.on_bad_row, listed=False), job.truncation(judge))
    wanted = list(islice((pair for part in parts for pair in part), job.control))
    ids = [pair.id for pair in wanted]
    found = read_control(job.out, len(judge.rules))
    if found is None or found[0] != ids:
        blocks = [wanted[i : i + job.part_size] for i in range(0, len(wanted), job.part_size)]
        scores = np.concatenate([judge.score_nothing([pair.prompt for pair in block]) for block in blocks])
        write_control(job.out, ids, scores)


def question_length(prompt: JudgePrompt) -> Callable[[Pair], int]:
    """Tokens of the longest question about a pair: the longer response, the longest rule."""
    short = ({"role": "user", "content": "Hello."},), "Hello."
    longest = max(range(len(prompt.pool)), key=lambda rule: len(prompt.chat.encode(prompt.text(*short, rule))))

    def length(pair: Pair) -> int:
        texts = (prompt.text(pair.prompt, response, longest) for response in (pair.response_a, pair.response_b))
        return max(map(len, prompt.chat.encode_many(texts)))

    return length


def _check_finite(scores: Scores, job: ScoreJob) -> None:
    good = np.isfinite([judged(x, scores.rules) for x in (scores.a, scores.b, scores.relevance)]).all(axis=0)
    if not good.all():
        name = scores.ids[int(np.argmin(good.all(axis=1)))]
        raise InputError(f"{job.judge}: the scores of pair {name!r} are not finite in {job.dtype}; check its weights")


def dry_run(job: ScoreJob, adapter: Chooser | None = None) -> dict[str, Any]:
    """Tokenise everything, time one batch, and predict the rest; of a table, check that it has what is needed.

    Which rules an adapter chooses is not known before it has read the pairs; as many stand in for them, evenly spread
    over the pool, but for ``token_costs``.
    """
    pool = RulePool.load(job.rules)
    if next(read_pairs(job.pairs, BadRows(job.on_bad_row, listed=False)), None) is None:
        raise InputError(f"{job.pairs}: holds no pairs")
    _check_adapter(job, pool, adapter)
    judge = job.source(pool)
    spread = None if adapter is None else np.linspace(0, len(pool) - 1, job.k).astype(np.int32)

    def ask(pairs: list[Pair]) -> Asked:
        return judge.ask(pairs, spread if spread is None else np.tile(spread, (len(pairs), 1)))

    bad, cut = BadRows(job.on_bad_row), job.truncation(judge)
    if isinstance(judge, Table):
        count = sum(map(len, job.parts(bad, cut)))
        return {"pairs": count, "skipped_rows": bad.count, "rules": len(pool), "rows": len(judge)}
    count = tokens = computed = separate = 0
    shapes: dict[int, int] = {}
    sample: list[Pair] = []
    for pairs in job.parts(bad, cut):
        asked = ask(pairs)
        trees = [questions.tree for _, questions in asked.questions]
        sample = sample or pairs[: max(1, SAMPLE_TOKENS * len(pairs) // sum(map(len, trees)))]
        rows, row_length = asked.packed.tokens.shape
        shapes[row_length] = shapes.get(row_length, 0) + rows
        count += len(pairs)
        tokens += sum(map(len, trees))
        computed += rows * row_length
        separate += sum(int(tree.positions[leaf]) + 1 for tree in trees for leaf in tree.leaves)
    asked = ask(sample)
    rate = asked.packed.tokens.size / _seconds(lambda: judge.answer(asked))
    seconds, chosen = computed / rate, {}
    if adapter is not None:
        own = _seconds(lambda: adapter.predict(sample, job.k)) / len(sample)
        seconds += own * count
        costs = token_costs(judge.prompt, adapter, sample, adapter.predict(sample, job.k))
        chosen = {"adapter_pairs_per_second": 1 / own, **costs}
    return {
        "pairs": count,
        "skipped_rows": bad.count,
        "truncated": cut.count,
        "rules": len(pool),
        "tokens": tokens,
        "tokens_one_sequence_a_rule": separate,
        "padding": 1 - tokens / computed,
        "rows": {f"{length} tokens": rows for length, rows in sorted(shapes.items())},
        "tokens_per_second": rate,
        "predicted_seconds": seconds / jax.process_count(),
        **chosen,
    }


def _seconds(run: Callable[[], Any]) -> float:
    """How long something takes once it is compiled."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _manifest(job: ScoreJob, source: Judge | Table, pool: RulePool, count: int, parts: int) -> dict[str, Any]:
    return {
        "pairs": job.pairs,
        "pairs_sha256": source_hash(job.pairs),
        "on_bad_row": job.on_bad_row,
        "truncate_to": job.truncate_to,
        "count": count,
        "part_size": job.part_size,
        "parts": parts,
        "pool": pool.name,
        "pool_hash": pool.hash,
        "rules": list(pool.ids),
        "rule_texts": [rule.text for rule in pool],
        "rule_signs": [rule.sign for rule in pool],
        "model": job.judge,
        "dtype": job.dtype,
        "quantize": job.quantize,
        "versions": {"adaptrm": adaptrm.__version__, "jax": jax.__version__},
        **source.describe(),
    }
