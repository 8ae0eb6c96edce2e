"""AdamW with warm-up, decay and clipping, from options."""

import re

import jax
import optax

from adaptrm.config import OptimizerOptions


def learning_rate(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, linear to 0, or half a cosine to 0 at the last step."""
    peak, warmup = options.learning_rate, options.warmup_steps
    after = max(steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, after),
        "cosine": optax.cosine_decay_schedule(peak, after),
    }[options.schedule]
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def decays(params):
    """Which parameters weight decay acts on: all but norms and biases."""
    name = jax.tree_util.keystr
    return jax.tree_util.tree_map_with_path(lambda path, _: not re.search("norm|bias", name(path)), params)


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (Loshchilov & Hutter 2019)."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            learning_rate(options, steps),
            b1=options.b1,
            b2=options.b2,
            eps=options.eps,
            weight_decay=options.weight_decay,
            mask=decays,
        ),
    )
