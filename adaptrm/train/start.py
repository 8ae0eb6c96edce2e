"""What a run starts from: tokenizer, config, pad token and weights that its options name."""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.config import TrainOptions, parse_options
from adaptrm.data.chat import ChatTokenizer, choose_pad_token, pad_can_end
from adaptrm.errors import InputError
from adaptrm.hf.cache import local_copy
from adaptrm.hf.folder import Folder, open_folder
from adaptrm.hf.load import abstract_model, load_weights
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.progress import say
from adaptrm.train.checkpoint import METADATA, Checkpoints, find, stored_config
from adaptrm.train.state import init_params, param_shardings
from adaptrm.train.step import Kind
from adaptrm.yaml_text import read_yaml

MODEL_TYPES = {"judge": CausalLM, "reward": SequenceClassifier}


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        name: for the model card.
        raw: its ``config.json``; ``config`` is that with the vocabulary that the pad token needs.
        pad: pad token and its id.
        folder: of the pretrained weights; None where they are random.
        named: the run or checkpoint whose parameters come before both.
    """

    kind: Kind
    name: str | None
    chat: ChatTokenizer
    raw: dict[str, Any]
    config: ModelConfig
    pad: tuple[str | None, int | None]
    folder: Folder | None
    named: str | None = None

    def params(self, mesh: Mesh, seed: int, resumed: bool = False) -> tuple[nnx.GraphDef, nnx.State]:
        """Definition and parameters on the mesh, in float32; their shapes where a run has a checkpoint of its own."""
        if resumed:
            return self._shapes(mesh)
        if self.named is not None:
            return self.checkpoint(self.named, mesh)
        if self.folder is not None:
            return self._pretrained(mesh, seed)
        return init_params(MODEL_TYPES[self.kind], self.config, seed, mesh)

    def _pretrained(self, mesh: Mesh, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
        vocab = self.config.vocab_size
        options = dict(dtype="float32", new_head_seed=seed, vocab_size=vocab)
        return load_weights(self.folder, MODEL_TYPES[self.kind], mesh, **options)[:2]

    def _shapes(self, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
        definition, abstract = abstract_model(MODEL_TYPES[self.kind], self.config)
        places = param_shardings(definition, abstract, mesh)
        shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        return definition, jax.tree.map(shape, abstract, places)

    def checkpoint(self, run: str | os.PathLike, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
        """Definition and parameters of a run's latest checkpoint, or of the one that is named."""
        definition, like = self._shapes(mesh)
        folder, step = find(run)
        if step is None:
            raise InputError(f"{run}: has no whole checkpoint yet; start the same adaptrm train again")
        with Checkpoints(folder, step=step) as checkpoints:
            return definition, checkpoints.restore_params(like)


def open_run(run: str | os.PathLike) -> Start:
    """What the training of a run folder, or of one checkpoint of it, started from.

    Raises:
        InputError: this is neither.
    """
    return start_of(*read_options(run))


def is_run(model: str | os.PathLike) -> bool:
    """Whether this is a run folder, or one checkpoint of it."""
    return any(paths.exists(paths.join(model, name)) for name in ("config.yaml", METADATA))


def read_options(run: str | os.PathLike) -> tuple[Kind, TrainOptions]:
    """Kind and options of a run folder by its config.yaml, of one checkpoint by what is kept in it."""
    file = paths.join(run, "config.yaml")
    if paths.exists(file):
        kind, section = read_run(file)
    elif paths.exists(paths.join(run, METADATA)):
        file = str(run)
        kind, section = _parse(stored_config(run), file)
    else:
        raise InputError(f"{run}: no config.yaml; this is not a run folder of adaptrm train")
    return kind, parse_options(section, f"{file}: {kind}")


def follow_checkpoint(kind: Kind, options: TrainOptions) -> TrainOptions:
    """With ``model.checkpoint``, what its run started from takes the place of ``pretrained`` and ``scratch``.

    Parameters belong to their tokenizer, config and pad token.
    """
    if (named := options.model.checkpoint) is None:
        return options
    its_kind, its = read_options(named)
    if its_kind != kind:
        raise InputError(f"{named}: is of train {its_kind}, not of train {kind}; give another model.checkpoint")
    model = replace(options.model, pretrained=its.model.pretrained, scratch=its.model.scratch)
    return replace(options, model=model)


def start_of(kind: Kind, options: TrainOptions) -> Start:
    """Tokenizer, config, pad token and weights that the options name."""
    if (options.model.pretrained is None) == (options.model.scratch is None):
        raise InputError("give one of model.pretrained (--model) and model.scratch")
    if (scratch := options.model.scratch) is not None:
        chat = ChatTokenizer.from_folder(local_copy(scratch.tokenizer))
        pad = _pad(kind, chat, None)
        sizes = {k: v for k, v in asdict(scratch).items() if k != "tokenizer"}
        # Tied, as small models are: their vocabulary would be most of their parameters.
        config = ModelConfig(vocab_size=chat.vocab_size, tie_word_embeddings=True, **sizes)
        config.check("model.scratch")
        return Start(kind, None, chat, config.to_hf(), config, pad, None, options.model.checkpoint)
    folder = open_folder(options.model.pretrained)
    chat = ChatTokenizer.from_folder(folder.path)
    pad = _pad(kind, chat, folder.pad_token_id if folder.is_classifier else None)
    config = replace(folder.config, vocab_size=max(folder.config.vocab_size, (pad[1] or 0) + 1))
    return Start(kind, options.model.pretrained, chat, folder.raw, config, pad, folder, options.model.checkpoint)


def _pad(kind: Kind, chat: ChatTokenizer, stored: int | None) -> tuple[str | None, int | None]:
    """A judge keeps its tokenizer's pad token, a reward model its own; a new reward model gets a safe one."""
    if kind == "judge":
        return chat.tokenizer.pad_token, chat.tokenizer.pad_token_id
    if stored is None:
        return choose_pad_token(chat)
    if pad_can_end(chat, stored):
        say(f"warning: pad token {stored} also ends conversations; as in transformers, rewards are read before it")
    return chat.tokenizer.convert_ids_to_tokens(stored), stored


def read_run(file: str) -> tuple[Kind, dict[str, Any]]:
    """Kind and section of a run's config.yaml."""
    return _parse(paths.read_bytes(file), file)


def _parse(text: str | bytes, where: str) -> tuple[Kind, dict[str, Any]]:
    try:
        stored = read_yaml(text, where)
        ((kind, section),) = stored.items()
        if kind not in MODEL_TYPES or not isinstance(section, dict):
            raise ValueError(kind)
    except (AttributeError, ValueError):  # InputError is a ValueError
        raise InputError(f"{where}: not the config of a run; delete the folder, or give another one") from None
    return kind, section
