"""A set of 64-bit numbers in little memory: a set of Python's takes some ninety bytes for each."""

from array import array

MOST_FULL = 2 / 3


class Seen:
    """Numbers below 2**64 that came before; 12 to 24 bytes each (open addressing, linear probing)."""

    def __init__(self):
        self._table, self._count = array("Q", bytes(8 << 10)), 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        return self._table[self._slot(number)] != 0

    def add(self, number: int) -> None:
        slot = self._slot(number)
        if self._table[slot]:
            return
        self._table[slot] = number or 1
        self._count += 1
        if self._count > MOST_FULL * len(self._table):
            old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
            for number in filter(None, old):
                self._table[self._slot(number)] = number

    def _slot(self, number: int) -> int:
        """Where a number lies, or the free slot (0) where it would."""
        number = number or 1  # as good a hash as 0
        table, last = self._table, len(self._table) - 1
        slot = number & last
        while table[slot] not in (0, number):
            slot = (slot + 1) & last
        return slot
