"""One rule: a statement about a response, and what it has to be."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BEGINNING = "The response "
MAX_TEXT = 400  # characters
MAX_NAME = 64  # of an id, a category, a pool's name and version
ID = re.compile(rf"\w[\w.-]{{0,{MAX_NAME - 1}}}", re.ASCII)
FIELDS = ("id", "category", "text", "sign")
# Only what certainly speaks of a second response: a judge sees one, and cannot compare it.
OTHER_RESPONSE = re.compile(
    r"(?i:\bthe other (?:response|answer|reply)\b|\bthan the other\b|\bother responses\b"
    r"|\b(?:both|either|neither|two) (?:of the )?responses?\b)|\bresponse [AB]\b"
)


@dataclass(frozen=True)
class Rule:
    """One statement about a response.

    Attributes:
        text: reads "The response ...", and can be judged on one response alone.
        sign: 1 where Yes speaks for the response, -1 where Yes speaks against it.
    """

    id: str
    category: str
    text: str
    sign: int = 1


def normalised(text: str) -> str:
    """What two texts share that say the same in other capitals, spaces or final stops."""
    return " ".join(text.casefold().split()).rstrip(" .!")


def problems(entry: Any) -> Iterator[str]:
    """What is wrong with one rule of a file, each with how to mend it."""
    if not isinstance(entry, dict):
        yield "a rule has the fields id, category and text; write {id: ..., category: ..., text: ...}"
        return
    for unknown in sorted(str(key) for key in entry if key not in FIELDS):
        yield f"unknown field {unknown!r}; known: {', '.join(FIELDS)}"
    id, sign = entry.get("id"), entry.get("sign", 1)
    if not isinstance(id, str) or not id.strip():
        yield "id is missing or no text; give one, in quotes if it is a number or a word such as on"
    elif not ID.fullmatch(id):
        yield f"id must be at most {MAX_NAME} of letters, digits, _, - and ., none of the last two first; rename it"
    if wrong := wrong_label(entry.get("category")):
        yield f"category {wrong}"
    yield from _text_problems(entry.get("text"))
    if type(sign) is not int or sign not in (1, -1):  # True is 1, and no sign
        yield f"sign must be 1 (Yes speaks for the response) or -1 (against it), not {sign!r:.40}"


def _text_problems(text: Any) -> Iterator[str]:
    if not isinstance(text, str) or not text.strip():
        yield "text is missing or no text; write a statement that begins with 'The response'"
        return
    text = text.strip()
    if odd := [character for character in text if not character.isprintable()]:
        yield f"text must be one line of printable characters; delete character U+{ord(odd[0]):04X}"
    if not text.startswith(BEGINNING):
        yield f"text must begin with 'The response' and go on; it begins with {text[:20]!r}"
    if len(text) > MAX_TEXT:
        yield f"text has {len(text)} characters, at most {MAX_TEXT} are allowed; shorten it"
    if other := OTHER_RESPONSE.search(text):
        yield f"text speaks of another response ({other[0]!r}), but a judge sees one; say what this one does"


def wrong_label(value: Any) -> str | None:
    """What is wrong with a name, version or category."""
    if not isinstance(value, str):
        return "is missing; give one" if value is None else f"must be text, not {value!r:.40}; put it in quotes"
    if not value.strip():
        return "is empty; give one"
    if not value.strip().isprintable() or len(value.strip()) > MAX_NAME:
        return f"must be one line of at most {MAX_NAME} printable characters; shorten it"
    return None
