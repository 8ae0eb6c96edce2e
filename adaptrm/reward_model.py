"""``RewardModel``: one score a conversation."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32

from adaptrm import paths
from adaptrm.data.chat import ChatTokenizer, pad_can_end
from adaptrm.data.chat_trees import conversation_tree, pair_length, pair_tree
from adaptrm.data.preferences import Pair
from adaptrm.errors import InputError
from adaptrm.hf.folder import listed, open_folder
from adaptrm.hf.load import load_weights
from adaptrm.models import SequenceClassifier
from adaptrm.models.heads import label_logits
from adaptrm.parallel import local_mesh, read_leaves
from adaptrm.prefix_tree import PrefixTree
from adaptrm.train.save import save_model
from adaptrm.train.start import is_run, open_run

TREES_AT_ONCE = 256  # packed together; more would fill rows no better


class RewardModel:
    """A sequence classifier with one label, its tokenizer and chat template."""

    def __init__(self, definition, params, raw: dict, chat: ChatTokenizer, pad, dtype: str, mesh: Mesh):
        self.chat, self.pad, self.mesh = chat, pad, mesh
        self._raw, self._params = raw, params
        self._program = partial(_rewards, definition, dtype, params)

    @classmethod
    def from_pretrained(
        cls, model_dir: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None
    ) -> "RewardModel":
        """A Hugging Face folder of a sequence classifier, a hub name, or a run of ``train reward``.

        A run that has not ended gives its latest checkpoint; ``RUN/checkpoints/STEP`` gives that one.

        Args:
            dtype: of the parameters and the computation; the head is always float32.
            mesh: None takes all devices of this process.

        Raises:
            InputError: the folder cannot be used.
        """
        mesh = mesh or local_mesh()
        whole = paths.join(model_dir, "export", "config.json")
        if is_run(model_dir) and not paths.exists(whole):
            start = open_run(model_dir)
            if start.kind != "reward":
                raise InputError(f"{model_dir}: is a run of train {start.kind}, not of train reward")
            definition, params = start.checkpoint(model_dir, mesh)
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            return cls(definition, params, start.raw, start.chat, start.pad, dtype, mesh)
        folder = open_folder(model_dir)
        if not folder.is_classifier:
            head = f"its head is {listed(folder.other_heads)}; only a linear `score` without bias is read"
            mend = head if folder.other_heads else "this is not a reward model, train one from it first"
            raise InputError(f"{model_dir}: has no score.weight; {mend}")
        pad_id = folder.pad_token_id
        definition, params, _ = load_weights(folder, SequenceClassifier, mesh, dtype=dtype)
        chat = ChatTokenizer.from_folder(folder.path)
        pad = (None if pad_id is None else chat.tokenizer.convert_ids_to_tokens(pad_id), pad_id)
        if pad_can_end(chat, pad_id):
            warnings.warn(
                f"{model_dir}: pad token {pad[0]!r} also ends conversations; as in transformers, rewards are read "
                "before it",
                stacklevel=2,
            )
        return cls(definition, params, folder.raw, chat, pad, dtype, mesh)

    def score(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Float32[np.ndarray, " conversations"]:
        """The reward of each conversation, a list of messages ``{"role", "content"}``."""
        trees = (conversation_tree(self.chat, [one], self.pad[1]) for one in conversations)
        return np.concatenate([np.zeros(0, np.float32), *self._read(trees)])

    def score_pairs(self, pairs: Sequence[Pair]) -> Float32[np.ndarray, "pairs 2"]:
        """The rewards of responses A and B of each pair; a prompt is computed once."""
        trees = (pair_tree(self.chat, pair, self.pad[1]) for pair in pairs)
        return np.stack([np.zeros(2, np.float32), *self._read(trees)])[1:]

    def pair_length(self, pair: Pair) -> int:
        """Tokens of the longer of a pair's two conversations."""
        return pair_length(self.chat, pair)

    def _read(self, trees: Iterator[PrefixTree]) -> Iterator[np.ndarray]:
        while some := list(islice(trees, TREES_AT_ONCE)):
            by_tree = read_leaves(some, self.mesh, self._program)
            yield from (by_tree[i] for i in range(len(some)))

    def save_pretrained(self, out_dir: str | os.PathLike) -> None:
        """Write a folder that transformers loads as ``AutoModelForSequenceClassification``."""
        save_model(out_dir, self._params, self._raw, self.chat, self.pad)


@partial(jax.jit, static_argnums=(0, 1))
def _rewards(definition, dtype, params, tokens, positions, subtree_end, leaves):
    model = nnx.merge(definition, params)
    hidden = model.model.at_leaves(tokens, positions, subtree_end, leaves, jnp.dtype(dtype))
    return label_logits(hidden, model.score.weight[...])[..., 0]
