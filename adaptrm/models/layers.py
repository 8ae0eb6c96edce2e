"""The parts of a decoder layer, under the names Hugging Face gives them.

Weights keep Hugging Face's ``[out, in]`` order, heads as a dimension of their own, so that loading is a reshape.
All layers of a model are one ``Layer`` whose weights have a leading layer dimension; ``jax.lax.scan`` walks it.
Every parameter names the logical axes of its dimensions (``Weight.axes``); ``parallel.sharding`` places them.

Shape suffixes: B rows, T tokens, D hidden size, F intermediate size, N heads, K kv heads, H head dim.
"""

import math
import re
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from adaptrm.attention import leaf_attention, tree_attention
from adaptrm.models.config import ModelConfig
from adaptrm.parallel.sharding import constrain, partition_spec
from adaptrm.products import precision_of, product

MIMETIC = 0.9  # share of the value projection in the output projection at the start


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def projected(equation: str, x: Array, weight: Array) -> Array:
    """``einsum(equation, x, weight)``, with a weight's gradient that a CPU finds quickly.

    Of a product over tokens XLA transposes the left operand, and on a CPU whatever it is computed from is then computed
    in transposed order, which takes longer than the product itself. So the smaller operand stands on the left.
    """
    return product(equation, x, weight)


def _projected_forward(equation, x, weight):
    return product(equation, x, weight), (x, weight)  # not ``projected``: remat policies look for products here


def _projected_backward(equation, saved, grad):
    x, weight = saved
    given, own, outputs = re.split(",|->", equation)
    grad_x = product(f"{outputs},{own}->{given}", grad, weight)
    left, right = sorted([(x, given), (grad, outputs)], key=lambda side: side[0].size)
    over = [name for name in given if name in outputs]
    dimensions = [[names.index(name) for name in over] for _, names in (left, right)]
    grad_weight = jax.lax.dot_general(left[0], right[0], (dimensions, ((), ())), precision=precision_of(x, grad))
    found = [name for name in left[1] + right[1] if name not in over]
    return grad_x, grad_weight.transpose([found.index(name) for name in own])


projected.defvjp(_projected_forward, _projected_backward)


class Weight(nnx.Module):
    """One parameter, with the logical axis of each dimension; as a projection it may have a bias.

    A bias has the leading axes of its weight, since those are the outputs. So has the scale of a weight in int8.
    """

    lora_a = lora_b = lora_scale = None  # of the class, so that adapters can come and go
    scale = None

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        rngs: nnx.Rngs | None = None,
        inputs: int = 1,
        bias: bool = False,
    ):
        """Normal initialisation by the fan-in (the last ``inputs`` dimensions) with ``rngs``, ones without."""
        value = jnp.ones(shape)
        if rngs is not None:
            value = jax.random.normal(rngs.params(), shape) * math.prod(shape[-inputs:]) ** -0.5
        self.weight = nnx.Param(value)
        self.bias = nnx.Param(jnp.zeros(shape[:-inputs])) if bias else None
        self.axes, self.inputs = axes, inputs

    @property
    def parameter_axes(self) -> dict[str, tuple[str, ...]]:
        """The logical axes of each parameter; the adapter's A maps inputs to its rank, B its rank to outputs."""
        outputs, inputs = self.axes[: -self.inputs], self.axes[-self.inputs :]
        lora_a = (*self.axes[:1], "rank", *inputs)
        named = {"weight": self.axes, "bias": outputs, "scale": outputs, "lora_a": lora_a, "lora_b": (*outputs, "rank")}
        return {name: axes for name, axes in named.items() if getattr(self, name) is not None}

    def project(self, equation: str, x: Array) -> Array:
        """``einsum(equation, x, weight)`` plus the bias and the adapter's part, in the dtype of ``x``."""
        out = projected(equation, x, self.weight[...].astype(x.dtype))
        if self.scale is not None:  # exact: it is of the output, and the integers are whole in every dtype
            out = (out * self.scale[...]).astype(x.dtype)
        if self.bias is not None:
            out += self.bias[...].astype(x.dtype)
        if self.lora_a is None:
            return out
        given, weight, outputs = re.split(",|->", equation)
        own, inputs = weight[: -self.inputs], weight[-self.inputs :]
        low = product(f"{given},r{inputs}->btr", x, self.lora_a[...].astype(x.dtype))
        return out + self.lora_scale * product(f"btr,{own}r->{outputs}", low, self.lora_b[...].astype(x.dtype))


class RMSNorm(Weight):
    """Root-mean-square norm, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], eps: float):
        super().__init__(shape, axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight[...].astype(x.dtype)


def rotations(
    config: ModelConfig, positions: Int32[Array, "batch tokens"]
) -> tuple[Float[Array, "batch tokens half_head_dim"], Float[Array, "batch tokens half_head_dim"]]:
    """Cosines and sines of rotary embeddings (Su et al. 2021), with Llama 3.1's scaling where the config asks for it.

    Found once for all layers: within a layer XLA finds them anew for every head, which took a CPU longer than norms.
    """
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * jnp.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    angles = positions.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angles), jnp.sin(angles)


def at_leaves(values: Float[Array, "rows tokens *rest"], leaves: Int32[Array, "rows leaves"]) -> Array:
    """What stands at the given token indices of each row, ``[rows, leaves, *rest]``."""
    return jnp.take_along_axis(values, leaves.reshape(*leaves.shape, *[1] * (values.ndim - 2)), axis=1)


def rotate(x_BTNH: Array, rotations_BTh: tuple[Array, Array]) -> Array:
    """Rotate the two halves of each head, in float32."""
    cos, sin = (x[:, :, None] for x in rotations_BTh)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)


ADAPTERS = ("lora_a", "lora_b")


def projections(model: nnx.Module) -> Iterator[Weight]:
    """The projections of the layers."""
    return (module for path, module in nnx.iter_modules(model) if path and str(path[-1]).endswith("_proj"))


def add_adapters(model: nnx.Module, rank: int, alpha: float) -> None:
    """Give every projection of the layers an adapter ``(alpha / rank) B A`` (Hu et al. 2021), all zero here."""
    for module in projections(model):
        shape = module.weight.shape
        module.lora_a = nnx.Param(jnp.zeros((shape[0], rank, *shape[-module.inputs :])))
        module.lora_b = nnx.Param(jnp.zeros((*shape[: -module.inputs], rank)))
        module.lora_scale = alpha / rank


def narrow_projections(model: nnx.Module) -> None:
    """Give every projection of the layers weights in int8 with a float32 scale an output, all zero here.

    ``hf.load`` fills them with ``weight / scale``, rounded.
    """
    for module in projections(model):
        shape = module.weight.shape
        module.weight = nnx.Param(jnp.zeros(shape, jnp.int8))
        module.scale = nnx.Param(jnp.zeros(shape[: -module.inputs]))


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        layers, hidden = config.num_hidden_layers, config.hidden_size
        query = (layers, config.num_attention_heads, config.head_dim, hidden)
        key = (layers, config.num_key_value_heads, config.head_dim, hidden)
        qkv, out = config.qkv_bias, config.attention_bias
        self.q_proj = Weight(query, ("layers", "heads", "head_dim", "embed"), rngs, bias=qkv)
        self.k_proj = Weight(key, ("layers", "kv_heads", "head_dim", "embed"), rngs, bias=qkv)
        self.v_proj = Weight(key, ("layers", "kv_heads", "head_dim", "embed"), rngs, bias=qkv)
        output = (layers, hidden, *query[1:3])
        self.o_proj = Weight(output, ("layers", "embed", "heads", "head_dim"), rngs, inputs=2, bias=out)
        if config.family.qk_norm:
            norm = ((layers, config.head_dim), ("layers", "head_dim"), config.rms_norm_eps)
            self.q_norm, self.k_norm = RMSNorm(*norm), RMSNorm(*norm)
        else:
            self.q_norm = self.k_norm = None
        if query == key:
            # Mimetic initialisation (Trockman & Kolter 2023): heads begin by looking for their own token and passing
            # it on, as trained ones do. Small models from random weights otherwise depend on luck to find that.
            self.k_proj.weight.set_value(self.q_proj.weight.get_value())
            values, out = self.v_proj.weight.get_value().transpose(0, 3, 1, 2), self.o_proj.weight.get_value()
            self.o_proj.weight.set_value(MIMETIC * values + (1 - MIMETIC**2) ** 0.5 * out)

    def __call__(
        self,
        x_BTD: Array,
        rotations_BTh: tuple[Array, Array],
        subtree_end_BT: Array,
        leaves_BM: Array | None = None,
    ) -> Array:
        """Of all tokens, or of the leaves alone."""
        own_BMD, own_rotations = x_BTD, rotations_BTh
        if leaves_BM is not None:
            own_BMD, own_rotations = jax.tree.map(lambda x: at_leaves(x, leaves_BM), (x_BTD, rotations_BTh))
        q = self.q_proj.project("btd,nhd->btnh", own_BMD)
        k = self.k_proj.project("btd,khd->btkh", x_BTD)
        v = self.v_proj.project("btd,khd->btkh", x_BTD)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, own_rotations), rotate(k, rotations_BTh)
        return self.o_proj.project("btnh,dnh->btd", sharded_attention(q, k, v, subtree_end_BT, leaves_BM))


def sharded_attention(
    q_BMNH: Array, k_BTKH: Array, v_BTKH: Array, subtree_end_BT: Array, leaves_BM: Array | None
) -> Array:
    """Tree attention on the current mesh: each device attends over its own rows and heads.

    Query heads follow their key heads, so heads are split only where both divide the tensor axis.
    """
    attention, queries = (tree_attention, ()) if leaves_BM is None else (leaf_attention, (leaves_BM,))
    arrays = q_BMNH, k_BTKH, v_BTKH, subtree_end_BT, *queries
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attention(*arrays)
    heads = ("rows", "tokens", "kv_heads", "head_dim")
    spec = partition_spec(mesh, k_BTKH.shape, heads)
    rows = partition_spec(mesh, subtree_end_BT.shape, heads[:2])
    specs = (spec, spec, spec, rows, *[rows] * len(queries))
    return jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        up = (config.num_hidden_layers, config.intermediate_size, config.hidden_size)
        bias = config.mlp_bias
        self.gate_proj = Weight(up, ("layers", "mlp", "embed"), rngs, bias=bias)
        self.up_proj = Weight(up, ("layers", "mlp", "embed"), rngs, bias=bias)
        self.down_proj = Weight((up[0], up[2], up[1]), ("layers", "embed", "mlp"), rngs, bias=bias)

    def __call__(self, x_BTD: Array) -> Array:
        gate = self.gate_proj.project("btd,fd->btf", x_BTD)
        up = self.up_proj.project("btd,fd->btf", x_BTD)
        return self.down_proj.project("btf,df->btd", jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        norm = ((config.num_hidden_layers, config.hidden_size), ("layers", "embed"), config.rms_norm_eps)
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x_BTD: Array,
        rotations_BTh: tuple[Array, Array],
        subtree_end_BT: Array,
        leaves_BM: Array | None = None,
    ) -> Array:
        """The residual stream after the layer, of all tokens, or of the leaves alone."""
        attended = self.self_attn(self.input_layernorm(x_BTD), rotations_BTh, subtree_end_BT, leaves_BM)
        h = (x_BTD if leaves_BM is None else at_leaves(x_BTD, leaves_BM)) + attended
        return constrain(h + self.mlp(self.post_attention_layernorm(h)), "rows", "tokens", "hidden")
