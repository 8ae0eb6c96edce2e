"""Which lowering a program takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from trees import fan, pack

from adaptrm.attention import dispatch

ARRAYS = [jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, heads, 8)), jnp.float32) for heads in (4, 2, 2)]
END = pack([fan(6, 2, 5)], 1, 16, 2).subtree_end


def blockwise() -> bool:
    """Whether the program is that of ``xla``, which alone has a gradient of its own here."""
    return "custom_vjp" in str(jax.make_jaxpr(lambda *qkv: dispatch.tree_attention(*qkv, END))(*ARRAYS))


def test_a_cpu_takes_xla_and_the_environment_another(monkeypatch):
    assert blockwise()
    monkeypatch.setenv(dispatch.FORCE, "reference")
    assert not blockwise()
    monkeypatch.setenv(dispatch.FORCE, "flash")
    message = refused(dispatch.tree_attention, *ARRAYS, END)
    assert message.startswith("ADAPTRM_ATTENTION is 'flash'; it must be one of: xla, reference")


def test_the_devices_of_the_mesh_decide(one_device, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "another")
    assert dispatch.platform() == "another"
    with jax.set_mesh(one_device):
        seen = []
        jax.jit(lambda x: (seen.append(dispatch.platform()), x)[1]).lower(1.0)
    assert seen == ["cpu"]


@pytest.mark.parametrize("name", dispatch.KERNELS.values())
def test_a_kernel_that_does_not_take_the_arrays_says_so_once(name, monkeypatch, capsys):
    """On a CPU none does."""
    monkeypatch.setitem(dispatch.KERNELS, "cpu", name)
    monkeypatch.setattr(dispatch, "_say_once", dispatch.cache(dispatch.say))
    assert blockwise() and blockwise()
    assert capsys.readouterr().err.count(f"attention by 'xla', not by the kernel {name!r}: ") == 1
    monkeypatch.setenv(dispatch.FORCE, name)
    assert refused(dispatch.tree_attention, *ARRAYS, END).startswith(f"ADAPTRM_ATTENTION={name}: ")
