"""A trained sequence classifier, from a folder or a run: what ``RewardModel`` and ``RuleAdapter`` share."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.card.license import license_of
from adaptrm.card.page import About
from adaptrm.config import Kind
from adaptrm.data.chat import ChatTokenizer, pad_can_end
from adaptrm.errors import InputError
from adaptrm.hf.folder import Folder, listed, open_folder
from adaptrm.hf.load import load_weights
from adaptrm.models import SequenceClassifier
from adaptrm.models.heads import label_logits
from adaptrm.parallel import local_mesh, read_leaves
from adaptrm.prefix_tree import PrefixTree
from adaptrm.train.save import save_model
from adaptrm.train.start import about_run, is_run, read_options, start_of

NAMES = {"reward": "reward model", "adapter": "rule adapter"}
TREES_AT_ONCE = 256  # packed together; more would fill rows no better


class Classifier:
    """A sequence classifier, its tokenizer and chat template."""

    kind: ClassVar[Kind]

    def __init__(
        self,
        definition: nnx.GraphDef,
        params: nnx.State,
        raw: dict[str, Any],
        chat: ChatTokenizer,
        pad: tuple[str | None, int | None],
        dtype: str,
        mesh: Mesh,
        rule_ids: Sequence[str] = (),
        folder: Path | None = None,
        about: About | None = None,
    ):
        self.chat, self.pad, self.mesh, self.rule_ids = chat, pad, mesh, tuple(rule_ids)
        self._raw, self._params, self._folder, self._about = raw, params, folder, about
        self._program = partial(_logits, definition, dtype, params)

    @classmethod
    def from_pretrained(cls, model_dir: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None) -> Self:
        """A Hugging Face folder of a sequence classifier, a hub name, or a run of ``adaptrm train``.

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
            kind, options = read_options(model_dir)
            start = start_of(kind, options)
            if start.kind != cls.kind:
                raise InputError(f"{model_dir}: is a run of train {start.kind}, not of train {cls.kind}")
            definition, params = start.checkpoint(model_dir, mesh)
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            about = about_run(start, options, model_dir)
            own = (definition, params, start.raw, start.chat, start.pad)
            return cls(*own, dtype, mesh, start.model.rule_ids, about=about)
        folder = open_folder(model_dir)
        if not folder.is_classifier:
            head = f"its head is {listed(folder.other_heads)}; only a linear `score` without bias is read"
            mend = head if folder.other_heads else f"this is not a {NAMES[cls.kind]}, train one from it first"
            raise InputError(f"{model_dir}: has no score.weight; {mend}")
        rule_ids = cls._labels(folder)
        pad_id = folder.pad_token_id
        labels = len(rule_ids) or 1
        definition, params, _ = load_weights(folder, SequenceClassifier, mesh, num_labels=labels, dtype=dtype)
        chat = ChatTokenizer.from_folder(folder.path)
        pad = (None if pad_id is None else chat.tokenizer.convert_ids_to_tokens(pad_id), pad_id)
        if pad_can_end(chat, pad_id):
            warnings.warn(
                f"{model_dir}: pad token {pad[0]!r} also ends conversations; as in transformers, scores are read "
                "before it",
                stacklevel=2,
            )
        about = About(models=[str(model_dir)], license=license_of(folder.path))
        return cls(definition, params, folder.raw, chat, pad, dtype, mesh, rule_ids, folder.path, about)

    @classmethod
    def _labels(cls, folder: Folder) -> tuple[str, ...]:
        """The rules that a folder's labels are of; none of a reward model."""
        return ()

    def logits(self, trees: Iterable[PrefixTree]) -> Iterator[np.ndarray]:
        """``[its leaves, labels]`` of each tree in turn, float32."""
        trees = iter(trees)
        while some := list(islice(trees, TREES_AT_ONCE)):
            by_tree = read_leaves(some, self.mesh, self._program)
            yield from (by_tree[i] for i in range(len(some)))

    def save_pretrained(self, out_dir: str | os.PathLike) -> None:
        """Write a folder that transformers loads as ``AutoModelForSequenceClassification``."""
        save_model(out_dir, self._params, self._raw, self.chat, self.pad, self._about, self.rule_ids)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(definition, dtype, params, tokens, positions, subtree_end, leaves):
    model = nnx.merge(definition, params)
    hidden = model.model.at_leaves(tokens, positions, subtree_end, leaves, jnp.dtype(dtype))
    return label_logits(hidden, model.score.weight[...])
