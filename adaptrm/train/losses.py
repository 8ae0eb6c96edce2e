"""Losses over the leaves of packed rows, in float32: each gives a sum, its weight, and sums of what to report."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from adaptrm.config import LossOptions
from adaptrm.errors import InputError

Sums = Mapping[str, Float[Array, ""]]
PER_PAIR = ("soft_labels", "label_smoothing", "margin")  # options that say something of one pair, not of a set


def check_loss(kind: str, options: LossOptions) -> None:
    """Raise where options of the loss do not go together.

    Raises:
        InputError: a judge or an adapter has loss options, or a loss over sets has those of pairs.
    """
    if kind != "reward" and options != LossOptions(k=options.k if kind == "adapter" else LossOptions.k):
        raise InputError(f"loss is of reward models; train {kind} has its own, drop the section")
    given = [name for name in PER_PAIR if getattr(options, name)]
    if options.kind != "bradley-terry" and given:
        raise InputError(f"loss.{given[0]} is of single pairs; set loss.kind: bradley-terry, or drop it")


def reward_loss(rewards: Float[Array, "rows leaves"], batch: Mapping[str, Any], options: LossOptions) -> Sums:
    """The loss that the options name, over the rewards at the leaves of a batch.

    Args:
        batch: ``targets``, ``weights``, ``margins`` and ``groups``, each ``[rows, leaves]``.

    Returns:
        Sums over the pairs or sets: loss, weight, accuracy, margin.
    """
    targets, weights, groups = batch["targets"], batch["weights"], batch["groups"]
    if options.kind == "bradley-terry":
        sums = bradley_terry(rewards, targets, weights, batch["margins"], options.label_smoothing)
    elif options.kind == "plackett-luce":
        sums = plackett_luce(rewards, targets, weights, groups)
    else:
        sums = all_pairs(rewards, targets, weights, groups)
    if options.center_rewards:
        sums = {**sums, "loss": sums["loss"] + options.center_rewards * centering(rewards, weights, groups)}
    return sums


def bradley_terry(
    rewards: Float[Array, "rows leaves"],
    targets: Float[Array, "rows leaves"],
    weights: Float[Array, "rows leaves"],
    margins: Float[Array, "rows leaves"] | float = 0.0,
    smoothing: float = 0.0,
) -> Sums:
    """``-log sigmoid(r(chosen) - r(rejected) - margin)``, with the label's probability where it is soft.

    ``-p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m)``, d = r(A) - r(B), p = P(A is better) (Bradley & Terry 1952;
    Christiano et al. 2017, eq. 1; margins: Touvron et al. 2023, eq. 2; smoothing: Mitchell 2023, conservative DPO).
    Leaves come in twos, response A and response B of a pair.

    Args:
        targets: probability that this response is the better one: p at A, 1 - p at B.
        weights: of the pair, at both its leaves; 0 where there is no pair or no label.
        margins: by how much the better one should win, at both leaves.
        smoothing: chance that a label is the wrong way round.

    Returns:
        Sums over the pairs: loss, weight, accuracy (the likelier one is strictly higher), margin.
    """
    weight, ahead = weights[:, 0::2], rewards[:, 0::2] - rewards[:, 1::2]
    margin = jnp.broadcast_to(margins, rewards.shape)[:, 0::2]
    p = targets * (1 - smoothing) + (1 - targets) * smoothing
    a_wins, b_wins = jax.nn.log_sigmoid(ahead - margin), jax.nn.log_sigmoid(-ahead - margin)
    ahead = ahead * jnp.sign(targets[:, 0::2] - targets[:, 1::2])
    return {
        "loss": -(weight * (p[:, 0::2] * a_wins + p[:, 1::2] * b_wins)).sum(),
        "weight": weight.sum(),
        "accuracy": (weight * (ahead > 0)).sum(),
        "margin": (weight * ahead).sum(),
    }


def plackett_luce(
    rewards: Float[Array, "rows leaves"],
    targets: Float[Array, "rows leaves"],
    weights: Float[Array, "rows leaves"],
    groups: Int32[Array, "rows leaves"],
) -> Sums:
    """``-sum_i log(exp r_i / (exp r_i + sum_j exp r_j))``, j over the set's responses that rank below i.

    With targets that all differ this is the likelihood of the ranking (Plackett 1975; ListMLE, Xia et al. 2008);
    equal ones are not compared. A set of two is a pair of ``bradley_terry``.

    Args:
        targets: higher is better.
        weights: of the set, at all its leaves.
        groups: which set of the row a leaf is of; its leaves stand together; -1 where there is none.

    Returns:
        Sums over the sets: loss, weight, accuracy and margin (means over the set's pairs of unequal targets).
    """
    above = _above(targets, groups)
    # Against itself too: nothing ranks below the last, which so adds log 1.
    against = above | jnp.eye(above.shape[-1], dtype=bool)
    loss = jax.nn.logsumexp(jnp.where(against, -_ahead(rewards), -jnp.inf), axis=-1)
    return {"loss": (weights * loss).sum(), **_set_sums(rewards, above, weights, groups)}


def all_pairs(
    rewards: Float[Array, "rows leaves"],
    targets: Float[Array, "rows leaves"],
    weights: Float[Array, "rows leaves"],
    groups: Int32[Array, "rows leaves"],
) -> Sums:
    """The mean over a set's pairs of unequal targets of ``-log sigmoid(r_i - r_j)`` (Ouyang et al. 2022, eq. 1).

    Arguments and sums as ``plackett_luce``.
    """
    above = _above(targets, groups)
    share = _pair_shares(above, groups)
    loss = (share * -jax.nn.log_sigmoid(_ahead(rewards))).sum(-1)
    return {"loss": (weights * loss).sum(), **_set_sums(rewards, above, weights, groups)}


def centering(
    rewards: Float[Array, "rows leaves"], weights: Float[Array, "rows leaves"], groups: Int32[Array, "rows leaves"]
) -> Float[Array, ""]:
    """The sum over sets of ``(2 mean reward)^2``: of a pair ``(r_A + r_B)^2`` (Eisenstein et al. 2023; TRL)."""
    same = _same(groups)
    mean = (same * rewards[:, None, :]).sum(-1) / jnp.maximum(same.sum(-1), 1)
    return (weights * _first(groups) * (2 * mean) ** 2).sum()


def label_cross_entropy(
    logits: Float[Array, "rows leaves labels"],
    targets: Float[Array, "rows leaves labels"],
    weights: Float[Array, "rows leaves"],
    k: int,
) -> Sums:
    """Binary cross-entropy of many labels, the mean over the labels (as ``BCEWithLogitsLoss``).

    Args:
        targets: k-hot, or probabilities.

    Returns:
        Sums over the leaves: loss, weight, accuracy. Most labels are 0, so that right answers say little: accuracy is
        overlap@k, the share of the k largest targets that are among the k largest logits.
    """
    loss = -(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)).mean(-1)
    return {
        "loss": (weights * loss).sum(),
        "weight": weights.sum(),
        "accuracy": (weights * overlap(logits, targets, k)).sum(),
    }


def overlap(
    logits: Float[Array, "*leaves labels"], targets: Float[Array, "*leaves labels"], k: int
) -> Float[Array, "*leaves"]:
    """The share of the k largest targets that are among the k largest logits; of equals the first are larger."""
    (_, said), (_, meant) = jax.lax.top_k(logits, k), jax.lax.top_k(targets, k)
    return (said[..., :, None] == meant[..., None, :]).any(-1).mean(-1)


def answer_cross_entropy(
    log_probabilities: Float[Array, "rows leaves answers"],
    answers: Float[Array, "rows leaves"],
    weights: Float[Array, "rows leaves"],
) -> Sums:
    """Cross-entropy of the right answer (Yes 0, No 1, Neither 2) as the next token.

    Args:
        log_probabilities: over the whole vocabulary, so that mass outside the answers costs too.

    Returns:
        Sums over the leaves: loss, weight, accuracy.
    """
    target = answers.astype(jnp.int32)
    right = jnp.take_along_axis(log_probabilities, target[..., None], axis=-1)[..., 0]
    return {
        "loss": (weights * -right).sum(),
        "weight": weights.sum(),
        "accuracy": (weights * (log_probabilities.argmax(axis=-1) == target)).sum(),
    }


def _ahead(rewards):
    """``[rows, leaves, leaves]``: by how much each leaf is ahead of each."""
    return rewards[:, :, None] - rewards[:, None, :]


def _same(groups):
    """``[rows, leaves, leaves]``: True where two leaves are of one set."""
    return (groups[:, :, None] == groups[:, None, :]) & (groups[:, :, None] >= 0)


def _above(targets, groups):
    """``[rows, leaves, leaves]``: True where the first is the better one of a set's pair."""
    return _same(groups) & (_ahead(targets) > 0)


def _first(groups):
    """True at the first leaf of each set."""
    before = jnp.pad(groups[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return (groups >= 0) & (groups != before)


def _pair_shares(above, groups):
    """``[rows, leaves, leaves]``: what each compared pair is of its set, so that a set's pairs sum to one."""
    pairs = (_same(groups) * above.sum(-1)[:, None, :]).sum(-1)
    return above / jnp.maximum(pairs, 1)[:, :, None]


def _set_sums(rewards, above, weights, groups):
    share, ahead = _pair_shares(above, groups), _ahead(rewards)
    return {
        "weight": (weights * _first(groups)).sum(),
        "accuracy": (weights[:, :, None] * share * (ahead > 0)).sum(),
        "margin": (weights[:, :, None] * share * ahead).sum(),
    }
