"""Which training examples hold texts of an evaluation suite: the same prompt, or the same 13 words in a row.

Two rows overlap where

- their prompts are the same: all messages with their roles, or the last message of the user alone where one of the two
  prompts has no other turn (two dialogues that both end in "Why?" are two prompts). Compared in lower case, each run of
  white space as one blank.
- 13 words in a row of a message of one's prompt, or of one of its responses, stand in a message or response of the
  other (Brown et al. 2020, arXiv 2005.14165, appendix C). Words are in lower case, between white space; of a word
  count letters, marks and digits, so "don't" is "dont". Shorter texts have no 13-gram, nor has writing without spaces.

What many say gives nothing away: the refusals of one model, disclaimers, templates. Brown et al. ignore 13-grams that
matched more than 10 training documents. Here a document is a conversation of the training set or of the suite, and
rows with the same first message of the user are one: what leaked into many pairs of one prompt is still found. How many
conversations have a 13-gram is told by 64 bits (linear counting, Whang et al. 1990), which never say more than there
are: 10 are never too many, 20 nearly always are. The same prompt always counts. Where the training set is small, or the
suite's responses are refusals, phrases of models are left among the 13-grams of responses: the counts of prompts tell
more.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
from jaxtyping import Int, UInt64

from adaptrm.data.preferences import Pair, ResponseSet, hash_id, read_sets
from adaptrm.data.rows import BadRows, Source
from adaptrm.watchdog import doing

WORDS = 13
MOST = 10  # conversations that may have a 13-gram
KINDS = ("prompt", "ngram_in_prompt", "ngram_in_response")  # what of a suite's row is found
ROWS_AT_ONCE = 256
SPARSE = 8  # possible first bits of a key, for each key that there is
KNOWN_WORDS, LONGEST_WORD = 1 << 17, 64  # whose hashes are kept

Row = Pair | ResponseSet
Keys = UInt64[np.ndarray, " keys"]
Numbers = Int[np.ndarray, " keys"]


class _Kept(dict):
    """For ``str.translate``: what is kept of a text."""

    def __missing__(self, code: int) -> int | None:
        kept = chr(code).isspace() or unicodedata.category(chr(code))[0] in "LMN"
        return self.setdefault(code, code if kept else None)


class _Hashes(dict):
    """64 bits of each word, the same in every process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= KNOWN_WORDS:
            self.clear()
        value = hash_id(word)
        if len(word) <= LONGEST_WORD:
            self[word] = value
        return value


_kept, _hashes = _Kept(), _Hashes()
# Odd, so that two runs which differ in one word never have the same sum; others have as hashes do.
_factors = np.array([hash_id(f"word {place}") | 1 for place in range(WORDS)], np.uint64)


def words_of(text: str) -> list[str]:
    """The words by which texts are compared."""
    return text.lower().translate(_kept).split()


def ngrams_of(texts: Sequence[Sequence[str]]) -> tuple[Keys, Numbers]:
    """Hashes of the 13-grams of texts, given as their words, and the number of the text that each is of."""
    hashes = np.fromiter(map(_hashes.__getitem__, chain.from_iterable(texts)), np.uint64)
    text = np.repeat(np.arange(len(texts)), [len(words) for words in texts])
    if len(hashes) < WORDS:
        return hashes[:0], text[:0]
    begin, end = text[: 1 - WORDS], text[WORDS - 1 :]
    return np.convolve(hashes, _factors, "valid")[begin == end], begin[begin == end]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _key(*parts: str) -> int:
    return hash_id("\x1f".join(parts))  # to Python white space, so no part holds it


def _prompt_keys(row: Row, asks: bool) -> list[int]:
    """What the row of a suite and the row that ``asks`` have in common where their prompts are the same."""
    said = [(message["role"], _plain(message["content"])) for message in row.prompt]
    is_lone = sum(role != "system" for role, _ in said) == 1
    last = ["lone"] + ["dialogue"] * is_lone if asks else ["lone" if is_lone else "dialogue"]
    return [_key("whole", *chain.from_iterable(said)), *(_key(turns, said[-1][1]) for turns in last)]


def _conversation(row: Row) -> int:
    """The bit, one of 64, of the row's conversation."""
    first = next(message["content"] for message in row.prompt if message["role"] == "user")
    return 1 << _key("conversation", _plain(first)) % 64


def _keys_of(rows: Sequence[Row], asks: bool = True) -> tuple[Keys, Numbers]:
    """The keys of rows, and whose they are: ``len(KINDS) * number + kind``."""
    keys, of_keys, texts, of_texts = [], [], [], []
    for number, row in enumerate(rows):
        same = _prompt_keys(row, asks)
        keys += same
        of_keys += [len(KINDS) * number] * len(same)
        for kind, said in enumerate(([message["content"] for message in row.prompt], row.responses), 1):
            texts += map(words_of, said)
            of_texts += [len(KINDS) * number + kind] * len(said)
    ngrams, text = ngrams_of(texts)
    owners = np.concatenate([np.array(of_keys, np.int64), np.array(of_texts, np.int64)[text]])
    return np.concatenate([np.array(keys, np.uint64), ngrams]), owners


def read_texts(source: Source, bad: BadRows | None = None) -> Iterator[Row]:
    """Rows of pairs, sets or labels; an id may come again, as in suites that number the rows of each subset anew."""
    return read_sets(source, bad, ids_checked=True)


def blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows, as many together as are hashed at once."""
    rows = iter(rows)
    while block := list(islice(rows, ROWS_AT_ONCE)):
        doing("looking for the texts of a suite")
        yield block


class SuiteTexts:
    """The texts of a suite as hashes: some 30 bytes a word, and nothing of the rows that they are looked for in.

    ``count`` all of the training set, then ``find`` in it. What is found of a row depends on the row, the suite and
    what was counted, in no matter which order.

    Attributes:
        ids, subsets: of the suite's rows; ``all`` where a row names no subset.
        keys: hashes of all that rows have in common with others, sorted; what follows is of each key.
        conversations: a bit for each conversation that has it; ``|`` joins what was counted apart.
        seen: whether a row that was counted has it.
    """

    def __init__(self, rows: Iterable[Row]):
        self.ids: list[str] = []
        self.subsets: list[str] = []
        keys, owners, bits = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], []
        for block in blocks(rows):
            of_block, of_row = _keys_of(block, asks=False)
            keys.append(of_block)
            owners.append(of_row + len(KINDS) * len(self.ids))
            bits += map(_conversation, block)
            self.ids += [row.id for row in block]
            self.subsets += [row.subset or "all" for row in block]
        every = np.concatenate(keys)
        order = np.argsort(every, kind="stable")
        self._owners = np.concatenate(owners)[order].astype(np.int32)
        self.keys, first = np.unique(every[order], return_index=True)
        self._bounds, self._is_ngram = np.append(first, len(every)), self._owners[first] % len(KINDS) > 0
        said = np.array(bits, np.uint64)[self._owners // len(KINDS)]
        self.conversations = np.bitwise_or.reduceat(said, first) if len(first) else said
        self.seen = np.zeros(len(first), bool)
        # Nearly all that is looked for is not there, and its first bits say so in one look.
        self._shift = np.uint64(64 - (SPARSE * len(first) + 1).bit_length())
        self._begins = np.zeros(1 << 64 - int(self._shift), bool)
        self._begins[self.keys >> self._shift] = True

    def count(self, rows: Iterable[Row]) -> int:
        """Learn which 13-grams are common; returns the number of rows."""
        total = 0
        for block in blocks(rows):
            number, at = self._known(block)
            bits = np.array([_conversation(row) for row in block], np.uint64)
            np.bitwise_or.at(self.conversations, at, bits[number])
            self.seen[at] = True
            total += len(block)
        return total

    def find(self, rows: Sequence[Row]) -> tuple[Numbers, Numbers]:
        """What rows share with the suite, as numbers of rows and of keys: sorted, each once, without what is common."""
        number, at = self._known(rows)
        found = np.unique(np.stack([number, at])[:, ~self.is_common(at)], axis=1)
        return found[0], found[1]

    def overlaps(self, row: Row) -> bool:
        return len(self.find([row])[0]) > 0

    def is_common(self, at: Numbers) -> np.ndarray:
        """Whether so many conversations have a key that it says nothing."""
        return self._is_ngram[at] & (np.bitwise_count(self.conversations[at]) > MOST)

    def owners(self, at: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Which rows of the suite have keys, in which of ``KINDS``, and the position in ``at`` of the key."""
        first, have = self._bounds[at], self._bounds[at + 1] - self._bounds[at]
        place = np.repeat(np.arange(len(at)), have)
        within = np.arange(len(place)) - (np.cumsum(have) - have)[place]
        return *np.divmod(self._owners[first[place] + within], len(KINDS)), place

    def _known(self, rows: Sequence[Row]) -> tuple[Numbers, Numbers]:
        """Which rows have which keys of the suite, by their numbers."""
        keys, owners = _keys_of(rows)
        maybe = np.flatnonzero(self._begins[keys >> self._shift])
        at = np.searchsorted(self.keys, keys[maybe])
        at[at == len(self.keys)] = 0  # beyond the last, so not the first either
        known = self.keys[at] == keys[maybe]
        return owners[maybe[known]] // len(KINDS), at[known]
