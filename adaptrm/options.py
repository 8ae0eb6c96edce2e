"""Options that several verbs take."""

from enum import StrEnum
from typing import Annotated

import typer

# What --pairs and --data take.
PAIRS = "JSONL(.gz), Parquet, a folder of save_to_disk, or a hub name OWNER/NAME[:CONFIG][:SPLIT]"
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Template(StrEnum):
    conversation_first = "conversation-first"
    rule_first = "rule-first"


class OnBadRow(StrEnum):
    fail = "fail"
    skip = "skip"


BAD_ROW = typer.Option(help="A row that is no pair: an error, or listed and left out.")
BadRow = Annotated[OnBadRow, BAD_ROW]
TruncateTo = Annotated[
    int | None,
    typer.Option(min=1, help="Cut what is longer than so many tokens, from the left. Nothing is cut without it."),
]
