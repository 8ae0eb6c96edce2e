"""One two-way table between Hugging Face tensor names and our parameters.

Our modules carry Hugging Face's names, and a parameter of the stacked layers stands for one tensor a layer; so a
row of the table is a name with ``{i}`` for the layer, the path of the parameter, and the shape of one tensor.
"""

import math
from dataclasses import dataclass

from flax import nnx

STACK = "model.layers."


@dataclass(frozen=True)
class Key:
    """One parameter of ours and the tensors that hold it.

    Attributes:
        path: of the parameter in the model's state.
        shape: of the parameter, layer dimension included.
        names: Hugging Face tensor names, one a layer; one for a parameter outside the layers.
        tensor_shape: of each of those tensors.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    tensor_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.names[0].startswith(STACK)


def key_table(state: nnx.State) -> list[Key]:
    """The table of a model, from its (abstract) state."""
    table = []
    for path, param in nnx.to_flat_state(state):
        shape = tuple(param.shape)
        dotted = ".".join(str(part) for part in path)
        stacked = dotted.startswith(STACK)
        own = shape[1:] if stacked else shape
        # Heads are a dimension of ours; Hugging Face folds them into the output (q, k, v) or the input (o).
        if dotted.endswith(".bias"):
            own = (math.prod(own),)
        elif len(own) == 3:
            own = (own[0], own[1] * own[2]) if dotted.endswith("o_proj.weight") else (own[0] * own[1], own[2])
        names = [dotted.replace(STACK, f"{STACK}{i}.", 1) for i in range(shape[0])] if stacked else [dotted]
        table.append(Key(tuple(path), shape, tuple(names), own))
    return table
