"""The optimizer and its learning rate, from options."""

import re

import jax
import optax

from adaptrm.config import OptimizerOptions
from adaptrm.errors import InputError


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


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """The direction of a step before it is multiplied by the learning rate, which the step's own number decides.

    Clipping by the global norm, then AdamW (Loshchilov & Hutter 2019), Adafactor (Shazeer & Stern 2018: factored second
    moments, no first, updates clipped at a root-mean-square of 1, steps not relative to the parameters), or plain SGD;
    then decoupled weight decay.

    Raises:
        InputError: an option that this optimizer has no use for.
    """
    if options.mu_dtype != "float32" and options.name != "adamw":
        raise InputError(f"optimizer.mu_dtype is {options.mu_dtype}; {options.name} has no first moment, only adamw")
    scaled = {
        "adamw": optax.scale_by_adam(options.b1, options.b2, options.eps, mu_dtype=options.mu_dtype),
        "adafactor": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "sgd": optax.identity(),
    }[options.name]
    decay = optax.add_decayed_weights(options.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), scaled, decay, optax.scale(-1.0))
