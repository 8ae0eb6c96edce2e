"""The verbs: parse, call, print. No logic, and nothing heavy imported before it is needed."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from adaptrm import __version__
from adaptrm.errors import RESTART, InputError, Stopped
from adaptrm.measure_verbs import measure_app
from adaptrm.model_verbs import model_app
from adaptrm.options import BAD_ROW, PAIRS, BadRow, Dtype, Json, OnBadRow, Template, TruncateTo
from adaptrm.preemption import stops_at_once
from adaptrm.results import show
from adaptrm.rule_verbs import rules_app
from adaptrm.watchdog import watching

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Label preference pairs by the safety rules that tell the two responses apart, train reward models on them.",
)
app.add_typer(rules_app, name="rules", help="Look after rule pools.")
app.add_typer(measure_app)
app.add_typer(model_app)


class Verb(StrEnum):
    reward = "reward"
    judge = "judge"
    adapter = "adapter"


class StepKind(StrEnum):
    train = "train"
    score = "score"


class Strategy(StrEnum):
    max_discrepancy = "max-discrepancy"
    evidence = "evidence"
    all = "all"
    random = "random"
    fixed = "fixed"
    relevance = "relevance"


class Quantize(StrEnum):
    int8 = "int8"


QuantizeTo = Annotated[Quantize | None, typer.Option(help="Keep the judge's projections in this; needs the extra.")]
Tensor = Annotated[
    int, typer.Option(min=1, help="Of a judge that scores: devices that split a layer; the rest split rows.")
]


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for everything it makes.")] = "adaptrm-demo",
    pairs: Annotated[int, typer.Option(min=24, help="Pairs to label in each world; fewer teach little.")] = 800,
    full: Annotated[bool, typer.Option("--full", help="Five seeds, with intervals of the differences.")] = False,
    as_json: Json = False,
) -> None:
    """Run the whole chain at tiny scale in two synthetic worlds, on a CPU, with no downloads."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the demo asks no hub for anything
    from adaptrm.demo.run import run_demo

    figures = run_demo(out, pairs, full)
    shown_by_table = () if as_json else ("worlds",)
    show({k: v for k, v in figures.items() if k not in shown_by_table}, as_json)


@app.command()
def score(
    pairs: Annotated[str, typer.Option(help=f"Pairs: {PAIRS}.")],
    judge: Annotated[
        str, typer.Option(help="Causal language model: a folder, a hub name or a run of train judge; or table:FILE.")
    ],
    rules: Annotated[str, typer.Option(help="Rule pool: a name or a YAML file.")],
    out: Annotated[str, typer.Option(help="Score folder; an unfinished one goes on.")],
    template: Annotated[Template, typer.Option(help="Order of the judge prompt.")] = Template.conversation_first,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the judge.")] = Dtype.float32,
    quantize: QuantizeTo = None,
    tensor: Tensor = 1,
    part_size: Annotated[int, typer.Option(min=1, help="Pairs a part; a rerun goes on by whole parts.")] = 256,
    columns: Annotated[
        list[str] | None, typer.Option(help="RULE=COLUMN,... of a table, where they differ; repeatable.")
    ] = None,
    value_range: Annotated[str, typer.Option("--range", help="LO,HI of a table's values.")] = "-1,1",
    on_bad_row: BadRow = OnBadRow.fail,
    truncate_to: TruncateTo = None,
    control: Annotated[
        int, typer.Option(min=0, help="Ask about an empty response to so many prompts too, for rules check.")
    ] = 0,
    adapter: Annotated[
        str | None, typer.Option(help="Rule adapter: the judge is asked about the rules that it chooses alone.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Rules a pair that the adapter chooses.")] = 5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count tokens and predict the time, write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score both responses of every pair against every rule, or those that an adapter chooses."""
    from adaptrm.parallel.distributed import start_processes

    start_processes()
    from adaptrm.judge.score import ScoreJob
    from adaptrm.judge.score import dry_run as predict
    from adaptrm.judge.score import score as run

    table = (tuple(columns or ()), value_range)
    job = ScoreJob(
        *(pairs, judge, rules, out, template.value, dtype.value, part_size, on_bad_row.value, truncate_to, *table),
        *(quantize and quantize.value, tensor, control, k),
    )
    chooser = None
    if adapter is not None:
        from adaptrm.rule_adapter import RuleAdapter

        chooser = RuleAdapter.from_pretrained(adapter, dtype.value, job.mesh())
    show((predict if dry_run else run)(job, chooser), as_json)


@app.command()
def label(
    scores: Annotated[str, typer.Option(help="Score folder.")],
    out: Annotated[str, typer.Option(help="Label file: JSONL or Parquet by its name.")],
    pairs: Annotated[str | None, typer.Option(help="The scored pairs, where they have moved.")] = None,
    strategy: Annotated[Strategy, typer.Option(help="How rules are selected.")] = Strategy.max_discrepancy,
    k: Annotated[int, typer.Option(help="Rules a pair; where an adapter chose them, all of those.")] = 5,
    discrepancy_weight: Annotated[float, typer.Option(help="Weight of |a - b| beside relevance.")] = 0.5,
    rule: Annotated[list[str] | None, typer.Option(help="A rule id, for strategy fixed; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="For strategy random.")] = 0,
    gold: Annotated[str | None, typer.Option(help="People's verdicts: labels, and what calibrates the rest.")] = None,
    review: Annotated[str | None, typer.Option(help="JSONL to write pairs to that people should look at.")] = None,
    target_error: Annotated[float | None, typer.Option(help="Abstain so that no more labels are wrong.")] = None,
    reliability: Annotated[str | None, typer.Option(help="Draw a reliability diagram: FILE.svg or FILE.png.")] = None,
    weights: Annotated[str | None, typer.Option(help="Evidence by the weights in this file.")] = None,
    save_weights: Annotated[str | None, typer.Option(help="Where to write the weights that evidence fits.")] = None,
    fall_back: Annotated[
        bool, typer.Option("--fall-back", help="Max-discrepancy, where scores cannot support evidence.")
    ] = False,
    project_length: Annotated[
        bool, typer.Option("--project-length", help="Evidence takes what goes along with length for noise.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Select the rules that decide each pair and label it."""
    from adaptrm.evidence.job import EvidenceOptions
    from adaptrm.evidence.table import for_people
    from adaptrm.label import LabelJob
    from adaptrm.label import label as run
    from adaptrm.reliability import with_reliability

    evidence = EvidenceOptions(weights, save_weights, fall_back, project_length)
    rules = tuple(rule or ())
    job = LabelJob(
        *(scores, out, pairs, strategy.value, k, discrepancy_weight, rules, seed, gold, evidence),
        *(review, target_error, reliability),
    )
    found = run(job)
    show(found if as_json else with_reliability(for_people(found)), as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    what: Annotated[Verb, typer.Argument(help="What to train.")],
    config: Annotated[str, typer.Argument(help="A config: a name or a YAML file.")],
    data: Annotated[str | None, typer.Option(help=f"Pairs: {PAIRS}.")] = None,
    labels: Annotated[str | None, typer.Option(help="Label file, or 'human'; for a judge a rule-label file.")] = None,
    rules: Annotated[str | None, typer.Option(help="Rule pool of a judge's rule labels, or of an adapter.")] = None,
    scores: Annotated[
        str | None, typer.Option(help="Of an adapter: a score folder, instead of labels whose rules it learns.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Start from this model.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; an unfinished run goes on. [runs/CONFIG]")] = None,
    on_bad_row: Annotated[OnBadRow | None, BAD_ROW] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Write a trace of a few steps to RUN/profile.")] = False,
    as_json: Json = False,
) -> None:
    """Train a reward model, a judge or a rule adapter; any option of the config as --section.key VALUE."""
    from pathlib import Path

    from adaptrm.config import load_options

    named = {"data.pairs": data, "data.labels": labels, "data.rules": rules, "model.pretrained": model}
    named |= {"data.scores": scores, "data.on_bad_row": on_bad_row and on_bad_row.value}
    overrides = dotted(ctx.args) | {key: value for key, value in named.items() if value is not None}
    options = load_options(config, what.value, overrides)
    from adaptrm.parallel.distributed import start_processes

    start_processes()
    from adaptrm.train.run import train as run

    with watching(options.watchdog_seconds):
        result = run(what.value, options, out or f"runs/{Path(config).stem}", profile)
    show(result, as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    ctx: typer.Context,
    config: Annotated[str, typer.Argument(help="A config: a name or a YAML file.")],
    target: Annotated[str, typer.Option(help="A TPU slice or GPUs: v5p:2x2x2, v5e:4x4, v6e:2x4, h100:8.")],
    only: Annotated[StepKind | None, typer.Option(help="Of a judge, only the step that trains or scores.")] = None,
    quantize: QuantizeTo = None,
    tensor: Tensor = 1,
    as_json: Json = False,
) -> None:
    """Compile a config's steps for devices that are not here: memory by part, and whether they fit.

    Any option of the config as --section.key VALUE. Nothing is downloaded and nothing runs on a device of this machine.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it would take this machine's accelerators
    from adaptrm.plan import for_people
    from adaptrm.plan import plan as run

    scoring = {"tensor": tensor, "quantize": quantize and quantize.value}
    found = run(config, target, dotted(ctx.args), "" if only is None else only.value, **scoring)
    show(found if as_json else for_people(found), as_json)


def dotted(args: list[str]) -> dict[str, str]:
    """``--section.key VALUE`` and ``--section.key=VALUE`` as a dictionary."""
    values: dict[str, str] = {}
    rest = list(args)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise InputError(f"unexpected argument {flag!r}; options of the config are given as --section.key VALUE")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"--{key}: needs a value")
            value = rest.pop(0)
        values[key] = value
    return values


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(f"adaptrm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: bad input is one line and exit code 2; what was told to stop, one line and 75."""
    # Without torch transformers warns that models will not be available, which are ours here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with stops_at_once(), _ended_together():
            app()
    except InputError as wrong:
        print(f"adaptrm: {wrong}", file=sys.stderr)
        leave(2)
    except Stopped as stopped:
        print(f"adaptrm: {stopped}", file=sys.stderr)
        try:
            if _joined():
                sys.modules["jax"].distributed.shutdown()  # all stop together: none may see another vanish
        finally:
            leave(RESTART)
    except Exception as failed:
        if type(failed).__name__ == "TrainingFailed":  # its module imports jax; its name does not
            print(f"adaptrm: {failed}", file=sys.stderr)
            leave(1)
        if not _joined():
            raise
        traceback.print_exc()
        leave(1)


@contextmanager
def _ended_together() -> Iterator[None]:
    """Several processes end well when the last of them does: jax's orderly end gives up on it after five minutes."""
    try:
        yield
    except SystemExit as ended:
        if not ended.code and _joined():
            from adaptrm.parallel.distributed import wait_for_all

            wait_for_all()
        raise


def _joined() -> bool:
    """Whether this is one of several processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int) -> None:
    """End this process at once: jax's orderly end would wait for other processes, and what the threads of a checkpoint
    that failed still have to say is of no use."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
