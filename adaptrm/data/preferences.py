"""Preference pairs in the forms that people have them, streamed row by row."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from adaptrm.data.rows import BadRows, OnBadRow, Row, Source, canonical, rows_of
from adaptrm.data.seen import Seen
from adaptrm.errors import InputError

ROLES = ("system", "user", "assistant")
Preferred = Literal["a", "b"] | None


@dataclass(frozen=True)
class Pair:
    """A prompt and two responses.

    Attributes:
        prompt: messages ``{"role", "content"}``, the last one of the user.
        preferred: the response that people preferred, where they were asked.
        subset: a name to report results by.
        margin: by how much the preferred response is better, where the row says so.
    """

    id: str
    prompt: tuple[Mapping[str, str], ...]
    response_a: str
    response_b: str
    preferred: Preferred = None
    subset: str | None = None
    margin: float | None = None

    def conversation(self, side: Literal["a", "b"]) -> list[dict[str, str]]:
        """The prompt continued by one of the responses."""
        return continued(self.prompt, self.response_a if side == "a" else self.response_b)

    @property
    def responses(self) -> tuple[str, ...]:
        return self.response_a, self.response_b

    def as_set(self) -> "ResponseSet":
        """The two responses as a set."""
        grades = tuple(float(self.preferred == side) for side in "ab")
        return ResponseSet(self.id, self.prompt, self.responses, grades, self.subset)

    def with_texts(self, prompt: tuple[Mapping[str, str], ...], responses: tuple[str, ...]) -> "Pair":
        """The same pair of other texts."""
        return replace(self, prompt=prompt, response_a=responses[0], response_b=responses[1])


@dataclass(frozen=True)
class ResponseSet:
    """A prompt and several responses, some better than others (best-of-n).

    Attributes:
        grades: of each response; higher is better, all equal where nobody said which.
        subset: a name to report results by.
    """

    id: str
    prompt: tuple[Mapping[str, str], ...]
    responses: tuple[str, ...]
    grades: tuple[float, ...]
    subset: str | None = None

    def with_texts(self, prompt: tuple[Mapping[str, str], ...], responses: tuple[str, ...]) -> "ResponseSet":
        """The same set of other texts."""
        return replace(self, prompt=prompt, responses=responses)


def continued(prompt: tuple[Mapping[str, str], ...], response: str) -> list[dict[str, str]]:
    """A prompt and the response that continues it, as messages."""
    return [*map(dict, prompt), {"role": "assistant", "content": response}]


def load_pairs(source: Source, on_bad_row: OnBadRow = "fail") -> list[Pair]:
    """All pairs of a file, of a hub name, or of anything that yields rows (a ``datasets`` set), in memory.

    Args:
        source: see ``rows_of``.
        on_bad_row: ``skip`` lists rows that are no pairs on stderr and leaves them out.

    Raises:
        InputError: a row is not a pair; names the line.
    """
    return list(read_pairs(source, BadRows(on_bad_row)))


def read_pairs(source: Source, bad: BadRows | None = None, ids_checked: bool = False) -> Iterator[Pair]:
    """Stream pairs; of each only a hash of its id stays in memory.

    A row of another form than the rows before it is a bad row, and so is one whose id has come before.

    Args:
        bad: what becomes of bad rows; None raises.
        ids_checked: someone has looked for repeated ids before: nothing stays in memory, what is repeated comes again.
    """
    yield from _read(source, bad or BadRows(), lambda row, at: list(pairs_of_row(row, at)), ids_checked)


def read_sets(
    source: Source,
    bad: BadRows | None = None,
    adapt: Callable[[ResponseSet, Row, str], ResponseSet] | None = None,
    ids_checked: bool = False,
) -> Iterator[ResponseSet]:
    """Stream rows as sets of responses: all of a best-of-n row, the two of any other; as ``read_pairs``.

    Args:
        adapt: each set, its row and where that stands to the set that is used; may raise InputError.
    """

    def of_row(row: Row, at: str) -> list[ResponseSet]:
        one = set_of_row(row, at)
        return [adapt(one, row, at) if adapt else one]

    yield from _read(source, bad or BadRows(), of_row, ids_checked)


def _read(source: Source, bad: BadRows, of_row: Callable[[Row, str], list], ids_checked: bool = False) -> Iterator:
    name = str(source) if isinstance(source, str | os.PathLike) else "pairs"
    seen = Seen()
    first = None
    for where, row in rows_of(source, bad):
        at = f"{name}: {where}"
        try:
            found, form = of_row(row, at), form_of(row, at)
            if form != (first or form):
                raise InputError(f"{at}: gives {form}; the rows before give {first}: mend it, or make two files")
            keys = set() if ids_checked else {hash_id(one.id) for one in found}
            if any(key in seen for key in keys):
                raise InputError(f"{at}: the id {found[0].id!r} is repeated; ids must be unique")
        except InputError as wrong:
            bad(wrong)
            continue
        first = form
        for key in keys:
            seen.add(key)
        yield from found


def hash_id(value: str) -> int:
    """64 bits of an id's hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


def pairs_of_row(row: Row, where: str) -> Iterator[Pair]:
    """The pairs of one row: one, or all of a best-of-n row.

    Raises:
        InputError: a column is missing, empty or of the wrong kind.
    """
    form, row_id, subset = form_of(row, where), _row_id(row, where), _subset(row, where)
    for suffix, prompt, a, b, preferred in FORMS[form](row, where):
        yield Pair(row_id + suffix, prompt, a, b, preferred, subset, margin_of(row))


def set_of_row(row: Row, where: str) -> ResponseSet:
    """The responses of one row: of a best-of-n row all, the chosen ones first.

    Raises:
        InputError: as ``pairs_of_row``.
    """
    if names := LISTS.get(form_of(row, where)):
        prompt, chosen, rejected = _sides(row, where, names)
        grades = (1.0,) * len(chosen) + (0.0,) * len(rejected)
        return ResponseSet(_row_id(row, where), prompt, (*chosen, *rejected), grades, _subset(row, where))
    (pair,) = pairs_of_row(row, where)
    return pair.as_set()


def _subset(row: Row, where: str) -> str | None:
    subset = row.get("subset")
    return None if subset is None else _whole(str(subset), "subset", where)


def _row_id(row: Row, where: str) -> str:
    row_id = row.get("id")
    if row_id is None:
        row_id = hashlib.sha256(canonical(row)).hexdigest()[:16]
    return check_response(str(row_id), "id", where)


def margin_of(row: Row) -> float | None:
    """The column ``margin`` where it is a number: data sets have texts under this name too."""
    margin = row.get("margin")
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool) and abs(margin) < 1e9
    return float(margin) if is_number else None


def form_of(row: Row, where: str) -> str:
    """In which form a row gives its pair, by its columns and what they hold: a key of ``FORMS``."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: must be an object with named columns, is {type(row).__name__}")
    if "response_a" in row and "response_b" in row:
        return "response_a and response_b"
    if "chosen_list" in row and "rejected_list" in row:
        return "chosen_list and rejected_list"
    if "chosen" not in row or "rejected" not in row:
        have = ", ".join(sorted(map(str, row))) or "nothing"
        needs = "response_a and response_b, or chosen and rejected, or chosen_list and rejected_list"
        raise InputError(f"{where}: needs {needs}; has {have}")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        texts = any(isinstance(one, str) for one in (*chosen, *rejected))
        return "chosen and rejected as lists of responses" if texts else "chosen and rejected as messages"
    if isinstance(chosen, str) and isinstance(rejected, str) and row.get("prompt") is None:
        return "chosen and rejected as dialogue"
    return "chosen and rejected as texts"


# Suffix of the id, prompt, response A, response B, which is preferred.
Parts = Iterator[tuple[str, tuple[Mapping[str, str], ...], str, str, Preferred]]


def _canonical(row: Row, where: str) -> Parts:
    preferred = row.get("preferred")
    if preferred not in ("a", "b", None):
        raise InputError(f"{where}: preferred is {preferred!r}; it must be a, b or null")
    prompt = check_prompt(row.get("prompt"), where)
    a, b = (check_response(row[name], name, where) for name in ("response_a", "response_b"))
    yield "", prompt, a, b, preferred


def _texts(row: Row, where: str) -> Parts:
    prompt = check_prompt(row.get("prompt"), where)
    a, b = (check_response(row[name], name, where) for name in ("chosen", "rejected"))
    yield "", prompt, a, b, "a"


def _best_of_n(row: Row, where: str) -> Parts:
    """Every chosen response against every rejected one."""
    prompt, *sides = _sides(row, where, LISTS[form_of(row, where)])
    for i, chosen in enumerate(sides[0]):
        for j, rejected in enumerate(sides[1]):
            yield f"#{i}-{j}", prompt, chosen, rejected, "a"


def _sides(row: Row, where: str, names: tuple[str, str]) -> tuple[tuple[Mapping[str, str], ...], list[str], list[str]]:
    """Prompt, chosen and rejected responses of a best-of-n row."""
    prompt = check_prompt(row.get("prompt"), where)
    sides = []
    for name in names:
        if not isinstance(row[name], list) or not row[name]:
            raise InputError(f"{where}: {' and '.join(names)} must be lists of responses, none of them empty")
        sides.append([check_reply(one, name, where) for one in row[name]])
    return prompt, *sides


def _messages(row: Row, where: str) -> Parts:
    """Replies beside their prompt, or whole conversations (a prompt beside these must agree with them)."""
    chosen, rejected = (check_messages(row[name], name, where) for name in ("chosen", "rejected"))
    given = row.get("prompt")
    given = given if given is None else check_prompt(given, where)
    shared = 0
    if given is None or len(chosen) > 1:
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        while shared and chosen[shared - 1]["role"] != "user":
            shared -= 1
    if len(chosen) != shared + 1 or len(rejected) != shared + 1:
        raise InputError(f"{where}: chosen and rejected must differ in their last message alone")
    begin = chosen[:shared]
    if shared and given is not None:
        # A prompt given as a text is one of the user's messages: UltraFeedback and others name no other.
        agrees = given[0] in begin if isinstance(row["prompt"], str) else given == begin
        if not agrees:
            raise InputError(f"{where}: prompt is not what chosen and rejected begin with; drop the column or mend it")
    prompt = check_prompt(begin if shared else given, where)
    a, b = (check_reply(side[shared:], name, where) for side, name in ((chosen, "chosen"), (rejected, "rejected")))
    yield "", prompt, a, b, "a"


def _dialogue(row: Row, where: str) -> Parts:
    """``\\n\\nHuman: ... \\n\\nAssistant: ...`` (HH-RLHF)."""
    roles = {"Human": "user", "Assistant": "assistant"}
    sides = {}
    for name in ("chosen", "rejected"):
        parts = re.split(r"\n\n(Human|Assistant):", row[name])
        if len(parts) < 5 or parts[0].strip():
            raise InputError(
                f"{where}: {name} is neither messages nor a Human:/Assistant: dialogue, and prompt is missing"
            )
        turns = zip(parts[1::2], parts[2::2], strict=True)
        sides[name] = [{"role": roles[who], "content": said.strip()} for who, said in turns]
    return _messages(sides, where)


FORMS: dict[str, Callable[[Row, str], Parts]] = {
    "response_a and response_b": _canonical,
    "chosen_list and rejected_list": _best_of_n,
    "chosen and rejected as texts": _texts,
    "chosen and rejected as messages": _messages,
    "chosen and rejected as dialogue": _dialogue,
    "chosen and rejected as lists of responses": _best_of_n,
}
# Forms of best-of-n, and their columns.
LISTS = {
    "chosen_list and rejected_list": ("chosen_list", "rejected_list"),
    "chosen and rejected as lists of responses": ("chosen", "rejected"),
}


def check_prompt(value, where: str) -> tuple[Mapping[str, str], ...]:
    """A prompt as messages, the last one of the user; a text is one message."""
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": _whole(value, "prompt", where)},)
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where}: prompt is missing or empty; give a text or a list of messages")
    messages = check_messages(value, "prompt", where)
    if messages[-1]["role"] != "user":
        raise InputError(f"{where}: the last message of prompt is of the {messages[-1]['role']}; it must be the user's")
    return messages


def check_messages(value, name: str, where: str) -> tuple[Mapping[str, str], ...]:
    """A list of messages, each with a known role and a text."""
    for message in value:
        good = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not good or message.get("role") not in ROLES:
            raise InputError(f"{where}: {name} must hold messages with a role ({', '.join(ROLES)}) and a content text")
    return tuple({"role": m["role"], "content": _whole(m["content"], name, where)} for m in value)


def check_reply(value, name: str, where: str) -> str:
    """A response, given as a text or as one message of the assistant."""
    if isinstance(value, list | tuple) and value:
        messages = check_messages(value, name, where)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise InputError(f"{where}: {name} must be one message of the assistant")
        value = messages[0]["content"]
    return check_response(value, name, where)


def check_response(value, name: str, where: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name} is empty or no text; drop the row or mend it")
    return _whole(value, name, where)


def _whole(text: str, name: str, where: str) -> str:
    """A text that UTF-8 can hold; JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {name} holds half of a character (a lone surrogate); mend the row") from None
    return text
