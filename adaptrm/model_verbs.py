"""The verbs that hand models over: parse, call, print, as ``cli.py`` does."""

import os
from typing import Annotated

import typer

from adaptrm.errors import InputError
from adaptrm.options import Dtype, Json
from adaptrm.results import show

model_app = typer.Typer()


@model_app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder of train, or one checkpoint of it: RUN/checkpoints/STEP.")],
    out: Annotated[str, typer.Argument(help="Hugging Face folder to write.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read it back and compare what it computes.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.float32,
    results: Annotated[
        list[str] | None, typer.Option(help="What evaluate wrote, for the model card; repeatable.")
    ] = None,
    overlap: Annotated[
        list[str] | None, typer.Option(help="What overlap wrote, for the model card; repeatable.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="OWNER/NAME: upload it there, to a private repository; never any data.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Upload to a public repository.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's latest checkpoint as a Hugging Face folder, with a model card; upload it where asked."""
    from adaptrm.parallel.distributed import start_processes
    from adaptrm.push import check_push, push

    if public and push_to_hub is None:
        raise InputError("--public goes with --push-to-hub OWNER/NAME")
    if push_to_hub is not None:
        check_push(push_to_hub)
    start_processes()
    from adaptrm.export import export_run

    verified = export_run(run, out, verify, dtype.value, results or (), overlap or (), push_to_hub)
    found = {"export": out} | ({"verified_by": verified} if verify else {})
    if push_to_hub is not None:
        found["hub"] = push(out, push_to_hub, public)
    show(found, as_json)


@model_app.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="A B ...: folders, hub names, runs, or RUN/checkpoints/STEP.")],
    out: Annotated[str, typer.Option(help="Hugging Face folder to write.")],
    weights: Annotated[
        str | None, typer.Option(help="One a model, to sum to 1: .7,.3; below 0 extrapolates. [equal]")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights. [that of the first model]")] = None,
    as_json: Json = False,
) -> None:
    """Average the weights of models that were trained from one start, or of one and its start."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: NumPy averages, and no accelerator is taken
    from adaptrm.merge import merge as run
    from adaptrm.merge import read_weights

    given = None if weights is None else read_weights(weights)
    show(run(models, out, given, dtype and dtype.value), as_json)
