"""The k best rules of each pair, exact: descending float32 selection score, ties to the lower index.

On a CPU a sort of every row costs many times what reading the scores does. There the pairs of a tile are the vector
dimension: the tile is transposed, and its rules go one after another through a network that keeps the k best of each
pair (compare with all of them, shift what is below), so that a rule costs a few vector instructions for eight or
sixteen pairs. Elsewhere ``lax.top_k`` does it.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

# Pairs of a tile, as parts that threads share and the pairs of a part, which lie side by side.
PARTS, SIDE = 8, 128
TILE = PARTS * SIDE
# Rules of a network: positions in it take 5 bits, so that six slots leave it as one array. XLA for CPUs has no fusions
# of several results, and would run the whole network anew for each.
BLOCK = 32
# Beyond these, networks cost more to compile or to run than they save.
MOST_RULES_SELECTED, MOST_CANDIDATES = 6, 64


def selection_score(
    a: Float32[Array, "*shape"],
    b: Float32[Array, "*shape"],
    relevance: Float32[Array, "*shape"],
    discrepancy_weight: Float32[Array, ""] | None,
    scale: Float32[Array, " rules"] | None = None,
) -> Float32[Array, "*shape"]:
    """``relevance + discrepancy_weight * |scale * (a - b)|`` (METHOD.md section 1, step 4, and section 3).

    Relevance alone without a weight; every rule's word counts the same without a scale.
    """
    if discrepancy_weight is None:
        return relevance
    difference = a - b if scale is None else scale * (a - b)
    weighted = discrepancy_weight * jnp.abs(difference)
    # Keeps product and sum two roundings, as the contract says: a fused multiply-add would order near-ties
    # differently. (XLA for CPUs removes an optimization_barrier before LLVM contracts the two.)
    return relevance + jnp.where(jnp.isnan(weighted), 0.0, weighted)


def where_in_range(
    value: Float32[Array, "*shape"],
    a: Float32[Array, "*shape"],
    b: Float32[Array, "*shape"],
    relevance: Float32[Array, "*shape"],
) -> Float32[Array, "*shape"]:
    """The value; nan where a score is not in [-1, 1] or relevance not in [0, 1] (what is nan is in no range)."""
    for good in (jnp.abs(a) <= 1, jnp.abs(b) <= 1, relevance >= 0, relevance <= 1):
        value = jnp.where(good, value, jnp.nan)
    return value


def all_in_range(
    a: Float32[Array, "pairs rules"], b: Float32[Array, "pairs rules"], relevance: Float32[Array, "pairs rules"]
) -> Bool[Array, " pairs"]:
    return ~jnp.isnan(where_in_range(jnp.zeros_like(a), a, b, relevance)).any(axis=1)


def top_rules(
    a: Float32[Array, "pairs rules"],
    b: Float32[Array, "pairs rules"],
    relevance: Float32[Array, "pairs rules"],
    discrepancy_weight: Float32[Array, ""] | None,
    k: int,
    checked: bool,
    scale: Float32[Array, " rules"] | None = None,
) -> tuple[Int32[Array, "pairs k"], Bool[Array, " pairs"] | None]:
    """The k best rules of each pair, best first, and where ``checked`` whether all its scores are in range."""
    pairs, rules = a.shape
    blocks = -(-rules // BLOCK)
    arrays = [x for x in (a, b, relevance, discrepancy_weight, scale) if x is not None]
    if pairs < TILE or k > MOST_RULES_SELECTED or blocks * k > MOST_CANDIDATES:
        return _sorted_rules(*arrays, k=k, checked=checked)
    cpu, other = (partial(way, k=k, checked=checked) for way in (_networked_rules, _sorted_rules))
    return lax.platform_dependent(*arrays, cpu=cpu, default=other)


def sorted_rules(score: Float32[Array, "pairs rules"], k: int) -> Int32[Array, "pairs k"]:
    """Positions of the k best scores, by XLA's own sort."""
    return lax.top_k(jnp.where(score == 0, 0.0, score), k)[1]  # it sorts -0 below 0, which would break a tie


def _sorted_rules(a, b, relevance, discrepancy_weight=None, scale=None, *, k: int, checked: bool):
    chosen = sorted_rules(selection_score(a, b, relevance, discrepancy_weight, scale), k)
    return chosen, all_in_range(a, b, relevance) if checked else None


def _networked_rules(a, b, relevance, discrepancy_weight=None, scale=None, *, k: int, checked: bool):
    """Tile by tile: the k best of each block of rules, then the k best of those candidates.

    Loops stand where XLA must not fuse: into a consumer it would put a network once for every use.
    """
    pairs, rules = a.shape
    blocks = -(-rules // BLOCK)
    size = -(-rules // blocks)
    kept = min(k, size)
    packing, merging = Packing(size, kept), Packing(blocks * kept, k)

    def of_tile(start):
        tile = [lax.dynamic_slice_in_dim(x, start, TILE).reshape(PARTS, SIDE, rules) for x in (a, b, relevance)]
        score = selection_score(*tile, discrepancy_weight, scale)
        if checked:  # in the same pass: out of range is nan, and a word of it is negative
            score = where_in_range(score, *tile)
        score = jnp.pad(
            score.transpose(0, 2, 1), ((0, 0), (0, blocks * size - rules), (0, 0)), constant_values=-jnp.inf
        )

        def of_block(number):
            block = lax.dynamic_slice_in_dim(score, number * size, size, axis=1)
            scores = [block[:, i] for i in range(size)]
            words = packing.pack(_best(scores, kept))
            if not checked:
                return words
            wrong = jnp.zeros(words[0].shape, bool)
            for x in scores:
                wrong |= jnp.isnan(x)
            return [jnp.where(wrong, -1, words[0]), *words[1:]]

        words = lax.map(of_block, jnp.arange(blocks))
        good = words[0].min(axis=0) >= 0 if checked else None
        if blocks == 1:
            return jnp.stack([packing.unpack([word[0] for word in words], slot) for slot in range(k)]), good

        def of_candidates(number):
            block = lax.dynamic_slice_in_dim(score, number * size, size, axis=1)
            here = [word[number] for word in words]
            return jnp.stack([_pick(block, packing.unpack(here, slot)) for slot in range(kept)], axis=1)

        found = lax.map(of_candidates, jnp.arange(blocks))
        candidates = [found[number, :, slot] for number in range(blocks) for slot in range(kept)]
        merged = merging.pack(_best(candidates, k))

        def of_slot(slot):
            candidate = merging.unpack(merged, slot)
            number, place = candidate // kept, candidate % kept
            own = [sum(jnp.where(number == i, word[i], 0) for i in range(blocks)) for word in words]
            return number * size + packing.unpack(own, place)

        return lax.map(of_slot, jnp.arange(k)), good

    # The last tile begins where it ends with the pairs, over some that the tile before has done.
    tiles = -(-pairs // TILE)
    chosen, good = lax.map(of_tile, jnp.minimum(jnp.arange(tiles) * TILE, pairs - TILE))
    done = (tiles - 1) * TILE

    def of_pairs(x):
        """``[tiles, pairs of a tile, ...]`` to ``[pairs, ...]``."""
        return jnp.concatenate([x[:-1].reshape(done, *x.shape[2:]), x[-1, TILE - (pairs - done) :]])

    chosen = of_pairs(chosen.reshape(tiles, k, TILE).swapaxes(1, 2))
    return chosen, of_pairs(good.reshape(tiles, TILE)) if checked else None


def _best(scores: list[Float32[Array, "*shape"]], k: int) -> list[Int32[Array, "*shape"]]:
    """Positions of the k largest of some arrays, elementwise, largest first, ties to the lower position.

    What comes later takes a place only where it is larger, so what came before stays ahead of its equals; the first k
    fill the places, so even -inf takes the place of nothing.
    """
    best: list[tuple] = []
    for position, score in enumerate(scores):
        new = (score, jnp.full(score.shape, position, jnp.int32))
        larger = [score > other for other, _ in best]
        moved = []
        for slot in range(min(len(best) + 1, k)):
            entry = new if slot == len(best) else _select(larger[slot], new, best[slot])
            moved.append(_select(larger[slot - 1], best[slot - 1], entry) if slot else entry)
        best = moved
    return [position for _, position in best]


def _pick(block: Float32[Array, "parts rules side"], rule: Int32[Array, "parts side"]) -> Float32[Array, "parts side"]:
    """The score of each pair's rule: to compare with all rules is faster here than to gather."""
    picked = block[:, 0]
    for i in range(1, block.shape[1]):
        picked = jnp.where(rule == i, block[:, i], picked)
    return picked


def _select(condition, one: tuple, other: tuple) -> tuple:
    return tuple(jnp.where(condition, x, y) for x, y in zip(one, other, strict=True))


class Packing:
    """Several small positions in each word of 31 bits; a negative word says that there are none."""

    def __init__(self, positions: int, slots: int):
        self.bits, self.slots = max(1, math.ceil(math.log2(positions))), slots
        self.each = 31 // self.bits

    def pack(self, positions: list[Int32[Array, "*shape"]]) -> list[Int32[Array, "*shape"]]:
        words = []
        for start in range(0, self.slots, self.each):
            shifted = [x << (self.bits * i) for i, x in enumerate(positions[start : start + self.each])]
            words.append(sum(shifted[1:], shifted[0]))
        return words

    def unpack(self, words: list[Int32[Array, "*shape"]], slot: int | Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
        """The position in a slot, which may differ by element."""
        number, place = slot // self.each, slot % self.each
        word = sum(jnp.where(number == i, x, 0) for i, x in enumerate(words)) if len(words) > 1 else words[0]
        return (word >> (self.bits * place)) & (2**self.bits - 1)
