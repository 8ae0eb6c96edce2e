"""Conversations cut from the left until they fit: done only where an option asks for it, and counted."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from adaptrm.data.preferences import Pair, ResponseSet
from adaptrm.data.rows import BadRows
from adaptrm.errors import InputError

Responses = TypeVar("Responses", Pair, ResponseSet)


class Truncation:
    """Cuts what is longer than a limit, and counts what it cut.

    Args:
        length: tokens of a pair as they are limited, the longer of its responses deciding.
        limit: in tokens; None cuts nothing.
    """

    def __init__(self, length: Callable[[Pair], int], limit: int | None):
        self.length, self.limit, self.count = length, limit, 0

    def __call__(self, pair: Pair) -> Pair:
        if self.limit is None:
            return pair
        cut = truncated(pair, self.length, self.limit)
        self.count += cut is not pair
        return cut


def usable(pairs: Iterable[Pair], cut: Truncation, bad: BadRows, name: str) -> Iterator[Pair]:
    """Pairs that the model takes, cut where they have to be: others, that its template refuses, are bad rows.

    Args:
        name: of where the pairs come from, for messages.
    """
    for pair in pairs:
        try:
            if bad.on_bad_row == "skip":
                cut.length(pair)  # renders it
            fitting = cut(pair)
        except InputError as wrong:
            bad(InputError(f"{name}: {wrong}"))
            continue
        yield fitting


def truncated(pair: Responses, length: Callable[[Responses], int], limit: int) -> Responses:
    """The pair (or set) itself where it fits, else with as little as possible cut from the left.

    First the prompt goes, its oldest message first, the system's included: a message of which nothing is left is
    dropped, and a reply whose question was dropped goes with it. The last message of the user keeps its last
    character. Then the responses go, the longest one first. All keep the same prompt.

    Args:
        length: tokens of a pair as rendered; nearly monotone in its characters.

    Raises:
        InputError: even the last characters do not fit.
    """
    if length(pair) <= limit:
        return pair
    # How many characters to cut: enough (all of them, which leaves the last ones), and too few.
    fits = sum(len(message["content"]) for message in pair.prompt) + max(map(len, pair.responses))
    over = 0
    if (least := length(_cut(pair, fits))) > limit:
        raise InputError(
            f"pair {pair.id!r}: has {least} tokens with all but its last characters cut, more than {limit}; "
            "raise --truncate-to (data.row_length in training)"
        )
    while fits - over > 1:
        middle = (fits + over) // 2
        if length(_cut(pair, middle)) <= limit:
            fits = middle
        else:
            over = middle
    return _cut(pair, fits)


def _cut(pair: Responses, count: int) -> Responses:
    """The pair without its first ``count`` characters, as far as they may go."""
    *earlier, question = pair.prompt
    prompt, orphaned = [], False
    for message in earlier:
        text, left = message["content"], count
        count = max(count - len(text), 0)
        if left and left >= len(text):
            orphaned |= message["role"] == "user"
        elif not (orphaned and message["role"] == "assistant"):
            orphaned = False
            prompt.append({**message, "content": text[left:]})
    text = question["content"]
    gone = min(count, max(len(text) - 1, 0))
    prompt.append({**question, "content": text[gone:]})
    keep = max(map(len, pair.responses)) - (count - gone)
    return pair.with_texts(tuple(prompt), tuple(text[-max(keep, 1) :] for text in pair.responses))
