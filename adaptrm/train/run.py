"""``adaptrm train``: from options to a run folder with checkpoints, metrics and an exported model."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import jax
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.config import Kind, LossOptions, TrainOptions, to_yaml
from adaptrm.data.pipeline import TreeStore
from adaptrm.data.plan import Plan, PlanOptions
from adaptrm.errors import InputError
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.lock import hold
from adaptrm.parallel import make_mesh
from adaptrm.progress import say
from adaptrm.rules import RulePool
from adaptrm.train.adapter_examples import adapter_examples
from adaptrm.train.checkpoint import latest_step
from adaptrm.train.evaluation import HeldOut, held_out_data, make_evaluation
from adaptrm.train.examples import Examples, judge_examples, reward_examples
from adaptrm.train.loop import run_steps
from adaptrm.train.losses import check_loss
from adaptrm.train.optimizer import make_optimizer
from adaptrm.train.profiler import profiled
from adaptrm.train.save import save_model
from adaptrm.train.start import (
    EXAMPLES,
    Start,
    about_run,
    follow_checkpoint,
    pinned,
    read_run,
    start_of,
    with_rule_ids,
)
from adaptrm.train.state import init_state
from adaptrm.train.step import Answers, make_step
from adaptrm.train.throughput import Throughput, multiplied_parameters
from adaptrm.train.trackers import check_trackers
from adaptrm.watchdog import LOADING, doing
from adaptrm.yaml_text import read_yaml

DIGEST = "examples.sha256"
UNITS = {"judge": "replies", "reward": "pairs", "adapter": "pairs"}
# Options that a run may change when it goes on: they do not touch what is computed.
FREE = ("mesh", "checkpoint", "log_every_steps", "trackers", "max_nonfinite_steps", "watchdog_seconds")


def train(kind: Kind, options: TrainOptions, out: str | os.PathLike, profile: bool = False) -> dict[str, Any]:
    """Train a judge, a reward model or a rule adapter; started again with the same folder it goes on.

    Restore precedence: the run's own newest whole checkpoint, with all that training needs; else the parameters that
    ``model.checkpoint`` names; else ``model.pretrained``; else random ones.

    Args:
        out: the run folder: config.yaml, metrics.jsonl, checkpoints/, and at the end export/.
        profile: write a trace of a few steps into its profile/.

    Returns:
        Steps, examples, rows skipped, examples dropped, truncated, mixed in and left out for what they share with a
        suite (``overlapping``), parameters, share of padding.

    Raises:
        InputError: options, data or the folder cannot be used.
        TrainingFailed: more losses or gradients than ``max_nonfinite_steps`` are not finite.
        Stopped: this machine goes away; started again the run goes on.
    """
    first = jax.process_index() == 0
    if jax.process_count() > 1 and not paths.is_local(out):
        raise InputError(f"{out}: several processes write one run together; give a folder that all of them share")
    if profile and not paths.is_local(out):
        raise InputError(
            f"{out}: a profile is written to a local run folder; give another --out, or leave out --profile"
        )
    options = pinned(with_rule_ids(kind, follow_checkpoint(kind, _from_anywhere(options))), out)
    check_loss(kind, options.loss)
    held_data = held_out_data(kind, options)
    with hold(out) if first else nullcontext():
        if first:
            check_trackers(options.trackers, out)
            _check_claim(out, kind, options)
        doing("reading the model", at_least=LOADING)
        mesh = _mesh(options)
        start = start_of(kind, options)
        resumed = latest_step(paths.join(out, "checkpoints")) is not None
        definition, params = start.params(mesh, options.seed, resumed)
        examples, answers = _examples(kind, options, start)
        store, left = examples(options.data, options.loss, False)
        doing("planning the rows")
        unit = "sets" if options.loss.kind != "bradley-terry" else UNITS[kind]
        plan = Plan(store.lengths, store.leaves, plan_options(options, mesh), options.epochs)
        steps = plan.steps_per_epoch * options.epochs
        steps = min(steps, options.max_steps or steps)
        step_fn = make_step(
            *(kind, definition, options.optimizer, steps, answers),
            *(options.model.dtype, options.model.remat, options.loss),
        )
        data, held_out = store.digest, None
        if held_data is not None:
            plain = LossOptions(
                options.loss.kind, k=options.loss.k
            )  # of plain choices, so that runs with other labels can be compared
            held_store, _ = examples(held_data, plain, True)
            program = make_evaluation(kind, definition, answers, options.model.dtype, plain)
            held_out = HeldOut(program, held_store, _held_out_plan(held_store, options, mesh), mesh, options.evaluation)
            data += f" {held_store.digest}"
        state = init_state(params, make_optimizer(options.optimizer), mesh)
        if first:  # only now: options that led to an error above hold no folder
            say(f"{len(store)} {unit}, {steps} steps of {plan.rows_per_step} rows, {plan.padding:.1%} padding")
            _check_examples(out, data)
            told = {"count": len(store), "unit": unit, "left": left, "rules": _pool(options)}
            _claim(out, kind, options, data, told)
        counts = (multiplied_parameters(state.whole), multiplied_parameters(state.frozen))
        throughput = Throughput(start.config, *counts, store, plan, list(mesh.devices.flat), unit)
        config = to_yaml(kind, options)
        traced = profiled(step_fn, paths.here(out) / "profile") if profile and first else nullcontext(step_fn)
        with traced as step_fn:
            state = run_steps(step_fn, state, store, plan, mesh, options, steps, out, throughput, config, held_out)
        doing("exporting the model", at_least=LOADING)
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        made = {"run": str(out), "steps": int(state.step), unit: len(store), **left}
        whole = state.whole
        del state, params  # room for what the weights are averaged with
        params = start.exported(definition, whole, mesh)
        about = about_run(start, options, out)
        save_model(paths.join(out, "export"), params, start.raw, start.chat, start.pad, about, start.model.rule_ids)
    return made | {"parameters": count, "padding": plan.padding}


def _examples(kind: Kind, options: TrainOptions, start: Start) -> tuple[Callable[..., Examples], Answers | None]:
    """How the examples of data are made, ``(data, loss, held_out)`` to them, and the answers of a judge."""
    chat, pad_id, seed, ids = start.chat, start.pad[1], options.seed, start.model.rule_ids
    if kind == "reward":
        return lambda data, loss, held_out: reward_examples(data, chat, pad_id, loss, seed), None
    if kind == "adapter":
        return lambda data, loss, held_out: adapter_examples(data, chat, pad_id, ids, loss.k, not held_out), None
    if options.data.rules is None:
        raise InputError("data.rules is missing: give the pool that the rule labels are of (--rules)")
    prompt = JudgePrompt(chat, RulePool.load(options.data.rules), options.data.template)
    return lambda data, loss, held_out: judge_examples(data, prompt), prompt.answers


def _from_anywhere(options: TrainOptions) -> TrainOptions:
    """Local paths from the root on, so that a run goes on and is exported from any working folder."""

    def placed(path: str | None, found=os.path.isfile) -> str | None:
        is_name = path is None or path == "human"  # as is what cannot be found: of the hub, of a pool
        return path if is_name or not found(path) else os.path.abspath(path)

    model, data, scratch = options.model, options.data, options.model.scratch
    if scratch is not None:
        scratch = replace(scratch, tokenizer=placed(scratch.tokenizer, os.path.isdir))
    named = placed(model.checkpoint, os.path.isdir)
    model = replace(model, pretrained=placed(model.pretrained, os.path.isdir), checkpoint=named, scratch=scratch)
    mix = tuple(replace(m, pairs=placed(m.pairs, os.path.exists), labels=placed(m.labels)) for m in data.mix)
    suites = tuple(placed(suite, os.path.exists) for suite in data.drop_overlap)
    data, held = (
        replace(
            source,
            pairs=placed(source.pairs, os.path.exists),
            labels=placed(source.labels),
            scores=placed(source.scores, os.path.isdir),
        )
        for source in (replace(data, rules=placed(data.rules), mix=mix, drop_overlap=suites), options.evaluation)
    )
    return replace(options, model=model, data=data, evaluation=held)


def _claim(out: str | os.PathLike, kind: Kind, options: TrainOptions, digest: str, told: dict[str, Any]) -> None:
    """Write down what this run is: its options, the hash of its examples and what its card will say of them."""
    files = {"config.yaml": to_yaml(kind, options), DIGEST: digest + "\n", EXAMPLES: json.dumps(told, indent=2) + "\n"}
    for name, content in files.items():
        paths.write_bytes(paths.join(out, name), content.encode())


def _pool(options: TrainOptions) -> dict[str, Any] | None:
    """The pool of a judge or an adapter, by name."""
    if options.data.rules is None:
        return None
    pool = RulePool.load(options.data.rules)
    return {"name": pool.name, "version": pool.version, "count": len(pool), "sha256": pool.hash}


def _check_claim(out: str | os.PathLike, kind: Kind, options: TrainOptions) -> None:
    """Raise where the folder holds another run than this one."""
    file = paths.join(out, "config.yaml")
    if not paths.exists(file):
        return
    stored_kind, stored = read_run(file)
    mine = read_yaml(to_yaml(kind, options), "options")[kind]
    if stored_kind != kind:
        raise InputError(f"{out}: holds a run of train {stored_kind}; give another --out")
    for key, value in mine.items():
        if key not in FREE and stored.get(key) != value:
            raise InputError(f"{out}: holds a run with another {key}; give another --out, or delete the folder")


def _check_examples(out: str | os.PathLike, examples: str) -> None:
    """Raise where a run would go on with other data than it began with."""
    file = paths.join(out, DIGEST)
    if paths.exists(file) and paths.read_bytes(file).decode("utf-8", "replace").strip() != examples:
        raise InputError(
            f"{out}: pairs, labels, rules or tokenizer have changed since this run began; give another --out"
        )


def _mesh(options: TrainOptions) -> Mesh:
    try:
        return make_mesh(**asdict(options.mesh))
    except ValueError as wrong:
        raise InputError(f"{wrong}; change the mesh section of the config") from None


def plan_options(options: TrainOptions, mesh: Mesh) -> PlanOptions:
    """How rows and steps are laid out on a mesh.

    Raises:
        InputError: options exclude each other, or rows do not divide the mesh.
    """
    data = options.data
    # Every part of a step is spread evenly over the devices.
    parts = options.optimizer.accumulate_steps
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * parts
    if data.exact_batch and data.pairs_per_step is None:
        raise InputError("data.exact_batch needs data.pairs_per_step")
    if data.exact_batch:  # as many rows as the pairs need, so that each device has the same number
        return PlanOptions(data.row_length, ways, data.pairs_per_step, options.seed)
    if data.pairs_per_step is not None:
        raise InputError("data.pairs_per_step needs data.exact_batch: true; without it a step is data.rows_per_step")
    if data.rows_per_step % ways:
        of = "data x fsdp" + " x optimizer.accumulate_steps" * (parts > 1)
        raise InputError(f"data.rows_per_step is {data.rows_per_step}; it must be a multiple of {of} = {ways}")
    return PlanOptions(data.row_length, data.rows_per_step, None, options.seed)


def _held_out_plan(store: TreeStore, options: TrainOptions, mesh: Mesh) -> Plan:
    """As many rows at once as a part of a step has."""
    rows = plan_options(options, mesh).rows_per_step // options.optimizer.accumulate_steps
    return Plan(store.lengths, store.leaves, PlanOptions(options.data.row_length, rows, None, options.seed), 1)
