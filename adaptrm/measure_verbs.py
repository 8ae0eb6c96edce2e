"""The verbs that measure: parse, call, print, as ``cli.py`` does."""

from enum import StrEnum
from typing import Annotated

import typer

from adaptrm.errors import InputError
from adaptrm.options import PAIRS, BadRow, Dtype, Json, OnBadRow, Template, TruncateTo
from adaptrm.results import show

measure_app = typer.Typer()


class Suite(StrEnum):
    pairs = "pairs"
    best_of_n = "best-of-n"
    rewardbench = "rewardbench"
    rewardbench_2 = "rewardbench-2"
    rm_bench = "rm-bench"
    xstest = "xstest"
    rules = "rules"


@measure_app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Reward model (of suite rules, rule adapter): a folder, a hub name or a run of train.")
    ],
    data: Annotated[str, typer.Option(help=f"What people labelled: {PAIRS}.")],
    out: Annotated[
        str, typer.Option(help="FILE.json; FILE.rows.parquet and, of RewardBench, FILE.leaderboard.json go beside it.")
    ],
    suite: Annotated[
        Suite,
        typer.Option(
            help="A benchmark; or pairs: is each chosen response above each rejected one; best-of-n: is the best one a "
            "chosen one; rules: an adapter's choice against --scores of all rules."
        ),
    ] = Suite.pairs,
    prior_sets: Annotated[
        str | None, typer.Option(help="Of suite rewardbench: allenai/pref-test-sets, or a file; a fifth section.")
    ] = None,
    tfidf: Annotated[
        str | None, typer.Option(help="Training pairs: words alone, learnt from these, are measured beside the model.")
    ] = None,
    scores: Annotated[str | None, typer.Option(help="Of suite rules: score folder of the pairs.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Of suite rules: rules a pair.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the model.")] = Dtype.float32,
    on_bad_row: BadRow = OnBadRow.fail,
    truncate_to: TruncateTo = None,
    as_json: Json = False,
) -> None:
    """Measure a reward model's accuracy, or how well an adapter chooses rules.

    The benchmarks' own rows are --data allenai/reward-bench (suites rewardbench and xstest), allenai/reward-bench-2 and
    THU-KEG/RM-Bench. Trivial scorers, such as the longer response, are measured on the same rows.
    """
    from adaptrm.parallel.distributed import start_processes

    start_processes()
    from adaptrm.evaluate.row_file import check_out

    check_out(out, data, prior_sets, tfidf)
    if prior_sets is not None and suite is not Suite.rewardbench:
        raise InputError("--prior-sets goes with --suite rewardbench")
    if scores is not None and suite is not Suite.rules:
        raise InputError("--scores goes with --suite rules")
    if tfidf is not None and tfidf in (data, prior_sets):
        raise InputError(f"--tfidf {tfidf}: are the pairs that are measured; give those of training")
    if suite is Suite.rules:
        from adaptrm.evaluate import rule_choice
        from adaptrm.rule_adapter import RuleAdapter

        if scores is None or truncate_to is not None or tfidf is not None:
            raise InputError(
                "--suite rules needs --scores, a score folder of all rules; it cuts no pair and takes no words"
            )
        adapter = RuleAdapter.from_pretrained(model, dtype.value)
        result = rule_choice.evaluate_rules(adapter, scores, data, out, k, model=model, dtype=dtype.value)
        show(result if as_json else rule_choice.for_people(result), as_json)
        return
    from itertools import chain

    from adaptrm.data.preferences import read_pairs
    from adaptrm.data.rows import BadRows
    from adaptrm.data.truncation import Truncation, usable
    from adaptrm.evaluate import SUITES
    from adaptrm.evaluate import evaluate as run
    from adaptrm.evaluate.rewardbench import read_prior_sets
    from adaptrm.evaluate.table import for_people
    from adaptrm.evaluate.trivial import TRIVIAL, fit_tfidf
    from adaptrm.reward_model import RewardModel

    trivial = TRIVIAL | (
        {} if tfidf is None else {"TF-IDF": fit_tfidf(read_pairs(tfidf, BadRows(on_bad_row.value)), tfidf)}
    )
    of_suite = SUITES[suite.value]
    reward_model = RewardModel.from_pretrained(model, dtype.value)
    bad, cut = BadRows(on_bad_row.value), Truncation(reward_model.pair_length, truncate_to)
    sets = usable(of_suite.read(data, bad), cut, bad, data)
    if prior_sets is not None:
        sets = chain(sets, usable(read_prior_sets(prior_sets, bad), cut, bad, prior_sets))
    left = {"skipped_rows": lambda: bad.count, "truncated": lambda: cut.count}
    named = {"name": suite.value, "model": model, "dtype": dtype.value, "data": data}
    result = run(reward_model.score_sets, of_suite, sets, out, trivial=trivial, counts=left, **named)
    show(result if as_json else for_people(result), as_json)


@measure_app.command()
def compare(
    results: Annotated[list[str], typer.Argument(help="A.json B.json ...: what evaluate wrote of each model.")],
    out: Annotated[str | None, typer.Option(help="Also write the comparison to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare reward models with the first of them, on the same rows of one suite.

    By section and subset: the difference, its paired 95 % interval and McNemar's test, by prompt. Of each model: ties,
    margins, calibration error, accuracy where the chosen response is the longer one and where it is the shorter.
    """
    from adaptrm import paths
    from adaptrm.evaluate.compare import as_text, for_people
    from adaptrm.evaluate.compare import compare as run
    from adaptrm.evaluate.row_file import check_out

    if out is not None:
        check_out(out, *results)
    result = run(results)
    if out is not None:
        paths.write_bytes(out, as_text(result))
    show(result if as_json else for_people(result), as_json)


@measure_app.command()
def overlap(
    train: Annotated[str, typer.Argument(help=f"Training pairs or labels: {PAIRS}.")],
    data: Annotated[str, typer.Argument(metavar="SUITE", help="Rows of a suite, in the same forms.")],
    suite: Annotated[
        Suite | None, typer.Option(help="Read the rows as this suite, so that its subsets have their names.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="FILE.json, which export --overlap puts into the model card.")] = None,
    on_bad_row: BadRow = OnBadRow.fail,
    as_json: Json = False,
) -> None:
    """Count training rows that hold a suite's prompts, or 13 words in a row of its texts.

    To leave them out of training give --data.drop_overlap SUITE to train.
    """
    from adaptrm.data.overlap import read_texts
    from adaptrm.data.overlap_report import for_people, overlap_report
    from adaptrm.evaluate import SUITES

    if suite is Suite.rules:
        raise InputError("--suite rules measures adapters; it has no rows")
    read = read_texts if suite is None else SUITES[suite.value].read
    result = overlap_report(train, data, out, read, on_bad_row.value)
    show(result if as_json else for_people(result), as_json)


class Strategy(StrEnum):
    """Those whose choice follows from the scores of one pair."""

    max_discrepancy = "max-discrepancy"
    evidence = "evidence"
    all = "all"
    relevance = "relevance"


@measure_app.command()
def explain(
    model: Annotated[str, typer.Argument(help="Reward model: a folder, a hub name or a run of train.")],
    pairs: Annotated[str, typer.Argument(help=f"Pairs: {PAIRS}.")],
    pair_id: Annotated[str | None, typer.Option("--id", help="Of the pair. [the first]")] = None,
    scores: Annotated[str | None, typer.Option(help="Score folder of the pairs; or")] = None,
    judge: Annotated[str | None, typer.Option(help="a judge that is asked now about --rules; or")] = None,
    labels: Annotated[str | None, typer.Option(help="a label file, whose rules decided.")] = None,
    rules: Annotated[str | None, typer.Option(help="Rule pool: a name or a YAML file.")] = None,
    strategy: Annotated[Strategy, typer.Option(help="How rules are selected.")] = Strategy.max_discrepancy,
    k: Annotated[int, typer.Option(min=1, help="Rules that decide.")] = 5,
    discrepancy_weight: Annotated[float, typer.Option(help="Weight of |a - b| beside relevance.")] = 0.5,
    weights: Annotated[str | None, typer.Option(help="Of strategy evidence: what label --save-weights wrote.")] = None,
    template: Annotated[Template, typer.Option(help="Order of the judge prompt.")] = Template.conversation_first,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the models.")] = Dtype.float32,
    as_json: Json = False,
) -> None:
    """Show why one pair got its label: the rules that decided, each response's score by rule, the rewards."""
    from adaptrm.explain import ExplainJob, for_people
    from adaptrm.explain import explain as run

    job = ExplainJob(
        *(model, pairs, pair_id, scores, judge, labels, rules, strategy.value, k, discrepancy_weight, weights),
        *(template.value, dtype.value),
    )
    found = run(job)
    show(found if as_json else for_people(found), as_json)
