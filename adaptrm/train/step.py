"""One optimizer step over a batch of packed rows, as one jitted program."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adaptrm.config import Kind, LossOptions, OptimizerOptions
from adaptrm.hf.load import logical_axes
from adaptrm.models.decoder import Remat
from adaptrm.models.heads import answer_log_probabilities, label_logits
from adaptrm.models.layers import at_leaves
from adaptrm.parallel import constrain
from adaptrm.train.losses import answer_cross_entropy, label_cross_entropy, reward_loss
from adaptrm.train.optimizer import learning_rate, make_optimizer
from adaptrm.train.state import TrainState, pinned

Answers = tuple[tuple[int, ...], ...]


def loss_sums(
    kind: Kind,
    definition: nnx.GraphDef,
    params,
    batch,
    answers: Answers | None,
    dtype,
    remat: Remat,
    loss: LossOptions,
):
    """The loss of a batch as sums, so that rows may be spread over devices."""
    model = nnx.merge(definition, params)
    hidden = model.model(batch["tokens"], batch["positions"], batch["subtree_end"], jnp.dtype(dtype), remat)
    hidden = at_leaves(hidden, batch["leaves"])
    if kind == "judge":
        read = answer_log_probabilities(hidden, model.unembedding, answers)
        return answer_cross_entropy(read, batch["targets"], batch["weights"])
    read = label_logits(hidden, model.score.weight[...])
    if kind == "adapter":
        return label_cross_entropy(read, batch["targets"], batch["weights"], loss.k)
    return reward_loss(read[..., 0], batch, loss)


@lru_cache(maxsize=8)
def make_step(
    kind: Kind,
    definition: nnx.GraphDef,
    optimizer_options: OptimizerOptions,
    steps: int,
    answers: Answers | None,
    dtype: str,
    remat: Remat,
    loss_options: LossOptions,
):
    """The jitted step; runs that differ in their data alone share one compiled program.

    Returns:
        ``step(state, batch) -> (state, metrics)``; the state is donated. A step whose loss or gradient is not finite
        leaves parameters and optimizer as they are, counts in ``skipped`` and says so in ``metrics["finite"]``.
    """
    optimizer = make_optimizer(optimizer_options)
    schedule = learning_rate(optimizer_options, steps)
    parts = optimizer_options.accumulate_steps

    def sums_and_gradient(params, frozen, batch):
        def loss(params):
            whole = nnx.merge_state(params, frozen)
            sums = loss_sums(kind, definition, whole, batch, answers, dtype, remat, loss_options)
            return sums["loss"], sums

        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, pinned(logical_axes(definition, nnx.merge_state(params, frozen)), gradient)

    def accumulated(params, frozen, batch):
        def add(total, part):
            part = {name: constrain(x, "rows", *["tokens"] * (x.ndim - 1)) for name, x in part.items()}
            return jax.tree.map(jnp.add, total, sums_and_gradient(params, frozen, part)), None

        # Part i takes rows i, i + parts, ...: of the rows that each device holds an equal share.
        split = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
        shapes = jax.eval_shape(sums_and_gradient, params, frozen, {name: x[0] for name, x in split.items()})
        sums, gradient = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        gradient = pinned(logical_axes(definition, nnx.merge_state(params, frozen)), gradient)
        return jax.lax.scan(add, (sums, gradient), split)[0]

    def step(state: TrainState, batch):
        sums, grads = (sums_and_gradient if parts == 1 else accumulated)(state.params, state.frozen, batch)
        weight = jnp.maximum(sums["weight"], 1e-9)
        metrics = {name: value / weight for name, value in sums.items()} | {"weight": sums["weight"]}
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # By the step's number and not by the optimizer's own count, which a step that is not finite leaves as it is.
        rate = schedule(state.step)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: rate * u, updates))
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
        params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
        skipped = state.skipped + ~finite
        metrics |= {"learning_rate": rate, "grad_norm": norm, "finite": finite, "skipped": skipped}
        return TrainState(state.step + 1, params, opt_state, skipped, state.frozen), metrics

    return jax.jit(step, donate_argnums=0)
