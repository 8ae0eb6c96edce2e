"""Benchmarks in a model card: tables for people, and what the hub reads."""

import re
from collections.abc import Sequence

from adaptrm.card.files import Ends, Overlap, Result
from adaptrm.card.markdown import data_name, one_line, plain, table

# Suites by the names under which the hub knows their data.
HUB_DATA = {
    "rewardbench": ("allenai/reward-bench", "RewardBench"),
    "rewardbench-2": ("allenai/reward-bench-2", "RewardBench 2"),
    "rm-bench": ("THU-KEG/RM-Bench", "RM-Bench"),
}


def results_markdown(results: Sequence[Result]) -> str:
    """A table a result: what the model gets right, beside scorers that read nothing."""
    return "\n\n".join(map(_result_markdown, results))


def _result_markdown(result: Result) -> str:
    others = list(result.baselines.values())

    def row(name: str, n: int | str, value: float | None, ends: Ends | None, of_others: Sequence) -> list[str]:
        return [name, str(n), _per_cent(value), " to ".join(map(_per_cent, ends or ())), *map(_per_cent, of_others)]

    rows = [row("all", result.n, result.accuracy, result.ci95, [other.accuracy for other in others])]
    if result.overall is not None:
        rows.append(row("overall", "", result.overall, result.overall_ci95, [other.overall for other in others]))
    for name, value in result.sections.items():
        of_others = [other.sections.get(name) for other in others]
        rows.append(row(f"section {plain(name)}", "", value, result.sections_ci95.get(name), of_others))
    for name, one in result.subsets.items():
        rows.append(row(plain(name), one.n, one.accuracy, one.ci95, [other.subsets.get(name) for other in others]))
    title = f"{HUB_DATA.get(result.suite, ('', result.suite))[1]}, {result.dtype}"
    return table([plain(title), "rows", "accuracy %", "95 % interval", *map(plain, result.baselines)], rows)


def overlap_markdown(overlaps: Sequence[Overlap]) -> str:
    rows = []
    for one in overlaps:
        of_suite = [plain(data_name(one.suite)), str(one.suite_rows), _part(one.suite_rows_overlapping, one.suite_rows)]
        of_train = [plain(data_name(one.train)), str(one.train_rows), _part(one.train_rows_overlapping, one.train_rows)]
        rows.append(of_suite + of_train)
    return table(["benchmark", "rows", "that overlap", "training data", "rows", "that overlap"], rows)


def eval_results(results: Sequence[Result], task: str) -> list:
    """The results as the hub reads them from a card (``model-index``): accuracies from 0 to 1."""
    from huggingface_hub import EvalResult

    found = []
    for result in results:
        slug = re.sub(r"[^\w./-]+", "-", one_line(result.suite), flags=re.ASCII)
        data, name = HUB_DATA.get(result.suite, (slug, one_line(result.suite)))
        figures = {"accuracy": result.accuracy, "overall": result.overall} | result.sections
        found += [
            EvalResult(
                task_type=task,
                dataset_type=data,
                dataset_name=name,
                metric_type="accuracy",
                metric_name=one_line(f"{figure} ({result.dtype})"),
                metric_value=round(value, 4),
            )
            for figure, value in figures.items()
            if value is not None
        ]
    return found


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _part(count: int, of: int) -> str:
    return f"{count} ({100 * count / of:.1f} %)" if of else str(count)
