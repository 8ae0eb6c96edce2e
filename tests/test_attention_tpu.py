"""The TPU kernel compiles: its lowering to Mosaic anywhere, the rest with the compiler for four kinds of TPU."""

import jax
import jax.numpy as jnp
import pytest

from adaptrm.attention import tpu
from adaptrm.plan import devices_of

SHAPES = {"Llama-3 8B": (32, 8, 128), "Llama-3 70B": (64, 8, 128), "SmolLM2": (9, 3, 64)}  # heads, kv heads, head dim
TARGETS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@jax.jit
def gradients(q, k, v, subtree_end):
    loss = lambda *qkv: tpu.tree_attention(*qkv, subtree_end).astype(jnp.float32).sum()  # noqa: E731
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def arguments(rows, tokens, heads, kv_heads, dim, dtype=jnp.bfloat16, device=None) -> list[jax.ShapeDtypeStruct]:
    place = None if device is None else jax.sharding.SingleDeviceSharding(device)
    shapes = [(rows, tokens, count, dim) for count in (heads, kv_heads, kv_heads)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    return [*arrays, jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=place)]


@pytest.mark.parametrize(("dim", "dtype"), [(128, jnp.bfloat16), (80, jnp.float32)])
def test_lowers_to_mosaic_without_a_tpu(dim, dtype):
    exported = jax.export.export(gradients, platforms=["tpu"])(*arguments(2, 1000, 4, 2, dim, dtype))
    assert exported.mlir_module().count("@tpu_custom_call") == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 4096, 32, 8, 128), jnp.bfloat16, None),
        ((4, 32768, 64, 8, 128), jnp.bfloat16, "4 rows of 32768 tokens have more pairs of blocks than"),
        ((1, 128, 64, 1, 128), jnp.bfloat16, "64 query heads of 128 bfloat16 numbers to a key head do not fit"),
        ((1, 128, 8, 8, 512), jnp.bfloat16, "heads of 512 numbers are larger than 256"),
        ((1, 128, 8, 8, 64), jnp.float16, "it takes bfloat16 or float32, not float16"),
    ],
)
def test_says_what_it_does_not_take(monkeypatch, shape, dtype, reason):
    q, k, *_ = arguments(*shape, dtype)
    assert tpu.unsupported(q, k) == "it is for TPUs, and this program is for a cpu"
    monkeypatch.setattr(tpu, "platform", lambda: "tpu")
    found = tpu.unsupported(q, k)
    assert found == reason or found.startswith(reason)


# Minutes: pytest -m aot_tpu.
@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_forward_and_backward(target, shape):
    pytest.importorskip("libtpu", reason="pip install 'adaptrm[tpu]'")
    _, devices = devices_of(target)
    given = arguments(1, 4096, *SHAPES[shape], device=devices[0])
    assert gradients.lower(*given).compile().as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 65408, 8, 1, 128), jnp.bfloat16),  # as many pairs of blocks as it takes
        ((1, 256, 16, 1, 128), jnp.float32),  # as many query heads
        ((1, 256, 8, 2, 256), jnp.float32),
        ((1, 256, 4, 2, 32), jnp.bfloat16),
        ((1, 1000, 4, 2, 80), jnp.bfloat16),
        ((3, 1000, 4, 4, 96), jnp.float32),
    ],
)
def test_compiles_what_it_says_it_takes(monkeypatch, shape, dtype):
    pytest.importorskip("libtpu", reason="pip install 'adaptrm[tpu]'")
    monkeypatch.setattr(tpu, "platform", lambda: "tpu")
    _, devices = devices_of("v5e:2x2")
    given = arguments(*shape, dtype, device=devices[0])
    assert tpu.unsupported(*given[:2]) is None
    gradients.lower(*given).compile()
