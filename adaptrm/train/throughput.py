"""How fast a step was: tokens and examples a second, share of the devices' peak (MFU), padding, memory."""

from dataclasses import dataclass

import jax
from flax import nnx

from adaptrm.data.pipeline import TreeStore
from adaptrm.data.plan import Plan
from adaptrm.models import ModelConfig

# Dense bfloat16 FLOPs a second, by how jax's device_kind begins; the first that fits. From the makers' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p, which names itself so or in full
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
# Looked up, or multiplied at the leaves alone: no part of what every token costs.
NOT_EVERY_TOKEN = {"embed_tokens", "lm_head", "score"}


def peak_flops(kind: str) -> float | None:
    """Of a device of this ``device_kind``; None where it is not known, as for a CPU."""
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)


def multiplied_parameters(params: nnx.State) -> int:
    """How many parameters every token is multiplied by."""
    flat = nnx.to_flat_state(params)
    return sum(param.get_value().size for path, param in flat if NOT_EVERY_TOKEN.isdisjoint(path))


def training_flops(config: ModelConfig, parameters: int, tokens: int, visible_pairs: int, frozen: int = 0) -> int:
    """FLOPs that a step needs, whatever is computed twice for memory (Chowdhery et al. 2022, appendix B).

    A multiply-add is 2 FLOPs, and the backward pass costs twice the forward one: 6 for each parameter and token. A
    query that sees a key multiplies ``head_dim`` numbers for the weight and as many for the sum in each head and layer:
    2 x 2 x 3 = 12.

    Args:
        parameters: as ``multiplied_parameters`` counts them.
        visible_pairs: (query, key) with the key visible to the query; in a dense causal mask about half of tokens^2.
        frozen: so many of the parameters are not trained: no gradient of theirs is needed, which saves 2.
    """
    a_pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (6 * parameters - 2 * frozen) * tokens + a_pair * visible_pairs


@dataclass(frozen=True)
class Throughput:
    """Tells of each step of a run.

    Args:
        parameters, frozen: as ``multiplied_parameters`` counts them, all and those that are not trained.
        devices: all that compute the step, those of other processes too.
        unit: what an example is called (pairs, replies).
    """

    config: ModelConfig
    parameters: int
    frozen: int
    store: TreeStore
    plan: Plan
    devices: list[jax.Device]
    unit: str

    def of_step(self, step: int, seconds: float | None) -> dict[str, int | float | None]:
        """Examples, padding (share of the computed tokens), rates, MFU and memory; null where something is not known.

        Args:
            seconds: None where they say nothing of the step, such as when it was compiled.
        """
        plan, members = self.plan, self.plan.members(step)
        tokens = int(plan.lengths[members].sum())
        peak = peak_flops(self.devices[0].device_kind)
        mfu = None
        if peak is not None and seconds is not None:
            visible = sum(self.store.visible_pairs(index) for index in members)
            flops = training_flops(self.config, self.parameters, tokens, visible, self.frozen)
            mfu = flops / seconds / (peak * len(self.devices))
        return {
            self.unit: len(members),
            "padding": 1 - tokens / (plan.rows_per_step * plan.options.row_length),
            "tokens_per_second": seconds and tokens / seconds,
            f"{self.unit}_per_second": seconds and len(members) / seconds,
            "mfu": mfu,
            "memory_gib": peak_memory_gib(self.devices),
        }


def peak_memory_gib(devices: list[jax.Device]) -> float | None:
    """The most that one of this process's devices has held at once; None where the platform does not say."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return max(peaks) / 2**30 if peaks else None
