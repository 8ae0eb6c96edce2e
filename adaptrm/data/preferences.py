"""Preference pairs in the forms that people have them, streamed row by row."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adaptrm import paths
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
    """

    id: str
    prompt: tuple[Mapping[str, str], ...]
    response_a: str
    response_b: str
    preferred: Preferred = None
    subset: str | None = None

    def conversation(self, side: Literal["a", "b"]) -> list[dict[str, str]]:
        """The prompt continued by one of the responses."""
        response = self.response_a if side == "a" else self.response_b
        return [*map(dict, self.prompt), {"role": "assistant", "content": response}]


def load_pairs(source: str | os.PathLike | Iterable[Mapping[str, Any]]) -> list[Pair]:
    """All pairs of a file, or of anything that yields rows (a ``datasets`` set), in memory.

    Raises:
        InputError: a row is not a pair; names the line.
    """
    return list(read_pairs(source))


def read_pairs(
    source: str | os.PathLike | Iterable[Mapping[str, Any]], adapt: Callable[[Pair, str], Pair] | None = None
) -> Iterator[Pair]:
    """Stream pairs; of each only a hash of its id stays in memory.

    Args:
        adapt: each pair and where it stands to the pair that is used; may raise InputError.
    """
    if isinstance(source, str | os.PathLike):
        rows, name = read_rows(source), str(source)
    else:
        rows, name = ((f"row {n}", row) for n, row in enumerate(source)), "pairs"
    seen: set[int] = set()
    for where, row in rows:
        for pair in pairs_of_row(row, f"{name}: {where}"):
            pair = adapt(pair, f"{name}: {where}") if adapt else pair
            key = hash_id(pair.id)
            if key in seen:
                raise InputError(f"{name}: {where}: the id {pair.id!r} is repeated; ids must be unique")
            seen.add(key)
            yield pair


def hash_id(value: str) -> int:
    """64 bits of an id's hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a JSONL(.gz) or Parquet file, each with where it stands."""
    if str(path).endswith(".parquet"):
        import pyarrow.lib
        import pyarrow.parquet

        with paths.reading(path) as stream:
            try:
                table = pyarrow.parquet.ParquetFile(stream)
                number = 0
                for batch in table.iter_batches(1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
            except (pyarrow.lib.ArrowException, OSError) as wrong:
                raise InputError(f"{path}: not a whole Parquet file: {str(wrong).splitlines()[0]}") from None
        return
    with paths.reading(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as wrong:
                    raise InputError(f"{path}: line {number}: not valid JSON: {wrong}") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path}: line {number}: must be a JSON object, is {type(row).__name__}")
                yield f"line {number}", row
        except (EOFError, OSError, zlib.error) as wrong:
            raise InputError(f"{path}: not a whole gzip file: {wrong}") from None


def pairs_of_row(row: Mapping[str, Any], where: str) -> Iterator[Pair]:
    """The pairs of one row: one, or all of a best-of-n row.

    Raises:
        InputError: a column is missing, empty or of the wrong kind.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: must be an object with named columns, is {type(row).__name__}")
    row_id = row.get("id")
    if row_id is None:
        content = json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)
        row_id = hashlib.sha256(content.encode()).hexdigest()[:16]
    row_id = _whole(str(row_id), "id", where)
    subset = row.get("subset")
    subset = None if subset is None else _whole(str(subset), "subset", where)
    if "response_a" in row and "response_b" in row:
        preferred = row.get("preferred")
        if preferred not in ("a", "b", None):
            raise InputError(f"{where}: preferred is {preferred!r}; it must be a, b or null")
        prompt = check_prompt(row.get("prompt"), where)
        a, b = (check_response(row[name], name, where) for name in ("response_a", "response_b"))
        yield Pair(row_id, prompt, a, b, preferred, subset)
    elif "chosen_list" in row and "rejected_list" in row:
        prompt = check_prompt(row.get("prompt"), where)
        if not isinstance(row["chosen_list"], list) or not isinstance(row["rejected_list"], list):
            raise InputError(f"{where}: chosen_list and rejected_list must be lists of responses")
        for i, chosen in enumerate(row["chosen_list"]):
            for j, rejected in enumerate(row["rejected_list"]):
                a, b = check_response(chosen, "chosen_list", where), check_response(rejected, "rejected_list", where)
                yield Pair(f"{row_id}#{i}-{j}", prompt, a, b, "a", subset)
    elif "chosen" in row and "rejected" in row:
        prompt, a, b = _chosen_rejected(row, where)
        yield Pair(row_id, prompt, a, b, "a", subset)
    else:
        have = ", ".join(sorted(map(str, row))) or "nothing"
        raise InputError(f"{where}: needs response_a and response_b, or chosen and rejected; has {have}")


def _chosen_rejected(row, where: str):
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        chosen, rejected = _dialogue(chosen, where), _dialogue(rejected, where)
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = check_messages(chosen, "chosen", where), check_messages(rejected, "rejected", where)
        shared = 0
        if prompt is None:
            while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
                shared += 1
            while shared and chosen[shared - 1]["role"] != "user":
                shared -= 1
            prompt = list(chosen[:shared])
        elif len(chosen) > 1:  # whole conversations beside their prompt, as UltraFeedback has them
            given = check_prompt(prompt, where)
            shared = len(given) if given == chosen[: len(given)] == rejected[: len(given)] else 0
        if len(chosen) != shared + 1 or len(rejected) != shared + 1:
            raise InputError(f"{where}: chosen and rejected must differ in their last message alone")
        chosen, rejected = (
            check_reply(side[shared:], name, where) for side, name in ((chosen, "chosen"), (rejected, "rejected"))
        )
    return (
        check_prompt(prompt, where),
        check_response(chosen, "chosen", where),
        check_response(rejected, "rejected", where),
    )


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


def check_reply(messages, name: str, where: str) -> str:
    """The text of a response given as one message of the assistant."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError(f"{where}: {name} must be one message of the assistant")
    return messages[0]["content"]


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


def _dialogue(text: str, where: str) -> list[dict[str, str]]:
    """``\\n\\nHuman: ... \\n\\nAssistant: ...`` (HH-RLHF) as messages."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if len(parts) < 5 or parts[0].strip():
        raise InputError(f"{where}: chosen is neither messages nor a Human:/Assistant: dialogue, and prompt is missing")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
