"""``select_rows`` over a mesh: pairs and rules both split, equal to one device bit for bit."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float32, Int32, UInt32

from adaptrm.selection.kernel import Evidence, at, drawn_rules, margin_of, sum_in_order
from adaptrm.selection.top_rules import selection_score, sorted_rules, top_rules


def select_sharded(
    a: Float32[Array, "pairs rules"],
    b: Float32[Array, "pairs rules"],
    relevance: Float32[Array, "pairs rules"],
    discrepancy_weight: Float32[Array, ""],
    fixed: Int32[Array, " k"] | None,
    seed: UInt32[Array, ""],
    row: Int32[Array, " pairs"],
    evidence: Evidence | None = None,
    *,
    strategy: str,
    k: int,
    pair_axes: tuple[str, ...] = ("data", "fsdp"),
    rule_axis: str = "tensor",
) -> tuple[Int32[Array, "pairs k"], Float32[Array, " pairs"]]:
    """As ``select_rows``, on the mesh of ``jax.set_mesh`` and within a jitted program.

    Each device finds the best of its own rules; of these candidates, k a device at most, the rule axis finds the best.
    Shards of rules lie in ascending order, so ties still go to the lower index. Neither pairs nor rules need to divide
    their axes.

    Args:
        pair_axes: mesh axes that split the pairs.
        rule_axis: mesh axis that splits the rules.

    Returns:
        Rules and margin, split over the pairs as these were.
    """
    mesh = jax.sharding.get_abstract_mesh()
    pairs, rules = a.shape
    ways = 1
    for axis in pair_axes:
        ways *= mesh.shape[axis]
    more_pairs, more_rules = -pairs % ways, -rules % mesh.shape[rule_axis]
    # Added pairs are cut off again; added rules come last and score -inf, so no strategy selects one.
    a, b, relevance = (jnp.pad(x, ((0, more_pairs), (0, more_rules))) for x in (a, b, relevance))
    row = jnp.pad(row, (0, more_pairs))
    each = a.shape[1] // mesh.shape[rule_axis]

    scale = None if evidence is None else jnp.pad(evidence.scale, (0, more_rules))

    def of_shard(a, b, relevance, discrepancy_weight, fixed, seed, row, evidence, scale):
        own = jax.lax.axis_index(rule_axis) * each  # index of the first rule here

        def gathered(x):
            """``[pairs, n]`` of all shards of rules, in order: ``[pairs, shards * n]``."""
            return jax.lax.all_gather(x, rule_axis, axis=1, tiled=True)

        if strategy in ("fixed", "random"):
            chosen = drawn_rules(strategy, fixed, seed, row, rules, k)
            here = (chosen >= own) & (chosen < own + each)
            place = jnp.clip(chosen - own, 0, each - 1)
            found = jnp.where(here, at(a, place) - at(b, place), 0.0)
            return chosen, sum_in_order(jax.lax.psum(found, rule_axis))  # all but one of the summands are 0
        weight = None if strategy == "relevance" else discrepancy_weight
        real = own + jnp.arange(each) < rules
        place, _ = top_rules(a, b, jnp.where(real, relevance, -jnp.inf), weight, min(k, each), False, scale)
        score = selection_score(
            *(at(x, place) for x in (a, b, relevance)), weight, None if scale is None else scale[place]
        )
        score = jnp.where(own + place < rules, score, -jnp.inf)
        best = sorted_rules(gathered(score), k)
        chosen = at(gathered(own + place), best)
        return chosen, margin_of(at(gathered(at(a, place) - at(b, place)), best), chosen, evidence)

    by_pair = PartitionSpec(pair_axes)
    scores, one = PartitionSpec(pair_axes, rule_axis), PartitionSpec()
    # check_vma would not see that what was gathered over the rule axis is the same on all of it.
    given = (scores,) * 3 + (one,) * 3 + (by_pair, one, PartitionSpec(rule_axis))
    run = jax.shard_map(of_shard, in_specs=given, out_specs=(by_pair, by_pair), check_vma=False)
    chosen, margin = run(a, b, relevance, discrepancy_weight, fixed, seed, row, evidence, scale)
    return chosen[:pairs], margin[:pairs]
