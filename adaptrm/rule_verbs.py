"""The verbs about rule pools, under ``adaptrm rules``: parse, call, print, as ``cli.py`` does."""

from typing import Annotated

import typer

from adaptrm.errors import InputError, printable
from adaptrm.options import Json
from adaptrm.results import show

rules_app = typer.Typer(no_args_is_help=True)
Pool = Annotated[str, typer.Argument(help="Rule pool: a name or a YAML file.")]


@rules_app.command()
def check(
    pool: Pool,
    scores: Annotated[str | None, typer.Option(help="Score folder of this pool: check the judge too.")] = None,
    pairs: Annotated[str | None, typer.Option(help="The scored pairs, where they have moved.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Rule labels that people gave to some of the scored responses: JSONL.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what is wrong with a rule pool, and whether a judge reads its rules.

    Errors keep a pool from being loaded (exit code 2). Everything else is advice (exit code 0): near-duplicates,
    comparatives, negations that confuse, two statements in one, odd lengths, unbalanced categories. With --scores:
    how much of what the judge says is one thing about every rule, or length; which rules it has no opinion on, which
    repeat each other, which never decide; and where people said which response is better, how far it agrees. With
    --labels also how far its answers are those of people, rule by rule.
    """
    from adaptrm.rules.check import check_pool

    for option, given in (("--pairs", pairs), ("--labels", labels)):
        if given is not None and scores is None:
            raise InputError(f"{option} goes with --scores, which says what the judge said")
    result = check_pool(pool)
    findings, result["findings"] = result["findings"], len(result["findings"]) - result["errors"]
    if as_json:
        result["findings"] = [vars(finding) for finding in findings]
    else:
        for finding in findings:
            print(printable(f"{pool}: {finding.place}{finding.kind}: {finding.message}"))
    if result["errors"] or scores is None:
        show(result, as_json)
    if result["errors"]:
        raise InputError(f"{pool}: cannot be loaded, errors: {result['errors']}; each is listed with its line")
    if scores is None:
        return
    from adaptrm.health.check import check_scores
    from adaptrm.health.table import for_people
    from adaptrm.rules import RulePool

    found = check_scores(scores, RulePool.load(pool), pairs, labels)
    if as_json:
        show(result | {"judge": found}, as_json)
        return
    for warning in found["warnings"]:
        print(printable(f"{scores}: {warning}"))
    show(result, as_json)
    show(for_people(found), as_json)


@rules_app.command()
def reduce(
    pool: Pool,
    scores: Annotated[str, typer.Option(help="Score folder of this pool.")],
    k: Annotated[int, typer.Option(help="Rules to keep.")],
    out: Annotated[str, typer.Option(help="Pool to write: a YAML file.")],
    as_json: Json = False,
) -> None:
    """Pick the rules that keep the most of what a judge's scores tell: what differs most and repeats least."""
    from adaptrm.health.reduce import for_people, reduce_pool
    from adaptrm.rules import RulePool

    found = reduce_pool(RulePool.load(pool), scores, k, out)
    show(found if as_json else for_people(found), as_json)
