"""Matrix products as exact as their operands say.

A TPU multiplies float32 by parts in bfloat16, a GPU by TF32 (10 bits), unless they are asked not to. Then scores depend
on the platform, ``export --verify`` compares roundings, and training from a row a step takes another course (measured:
the first loss moves by 7e-4, and a judge that learns on a CPU does not on a GPU). Who wants speed takes bfloat16.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def precision_of(*operands: Array) -> lax.Precision:
    """For ``lax.dot_general`` and the like."""
    return lax.Precision.HIGHEST if jnp.float32 in [x.dtype for x in operands] else lax.Precision.DEFAULT


def product(equation: str, x: Array, y: Array, sums=None) -> Array:
    """``jnp.einsum`` of two operands.

    Args:
        sums: the dtype that is accumulated in and that comes out; None takes that of the operands.
    """
    return jnp.einsum(equation, x, y, precision=precision_of(x, y), preferred_element_type=sums)
