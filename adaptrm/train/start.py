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
from adaptrm.hf.load import Folder, abstract_model, load_weights, open_folder
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.progress import say
from adaptrm.train.checkpoint import Checkpoints
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
    """

    kind: Kind
    name: str | None
    chat: ChatTokenizer
    raw: dict[str, Any]
    config: ModelConfig
    pad: tuple[str | None, int | None]
    folder: Folder | None

    def params(self, mesh: Mesh, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
        """Definition and parameters on the mesh, in float32."""
        model_type = MODEL_TYPES[self.kind]
        if self.folder is None:
            return init_params(model_type, self.config, seed, mesh)
        vocab = self.config.vocab_size
        options = dict(dtype="float32", new_head_seed=seed, vocab_size=vocab)
        return load_weights(self.folder, model_type, mesh, **options)[:2]

    def checkpoint(self, run: str | os.PathLike, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
        """Definition and parameters of a run's latest checkpoint."""
        definition, abstract = abstract_model(MODEL_TYPES[self.kind], self.config)
        places = param_shardings(definition, abstract, mesh)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
        with Checkpoints(paths.join(run, "checkpoints"), training=False) as checkpoints:
            if checkpoints.latest_step is None:
                raise InputError(f"{run}: has no whole checkpoint yet; start the same adaptrm train again")
            return definition, checkpoints.restore_params(like)


def open_run(run: str | os.PathLike) -> Start:
    """What a run folder's training started from, by its config.yaml.

    Raises:
        InputError: this is not a run folder.
    """
    file = paths.join(run, "config.yaml")
    if not paths.exists(file):
        raise InputError(f"{run}: no config.yaml; this is not a run folder of adaptrm train")
    kind, section = read_run(file)
    return start_of(kind, parse_options(section, f"{file}: {kind}"))


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
        return Start(kind, None, chat, config.to_hf(), config, pad, None)
    folder = open_folder(options.model.pretrained)
    chat = ChatTokenizer.from_folder(folder.path)
    pad = _pad(kind, chat, folder.pad_token_id if folder.is_classifier else None)
    config = replace(folder.config, vocab_size=max(folder.config.vocab_size, (pad[1] or 0) + 1))
    return Start(kind, options.model.pretrained, chat, folder.raw, config, pad, folder)


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
    text = paths.read_bytes(file)
    try:
        stored = read_yaml(text, file)
        ((kind, section),) = stored.items()
        if kind not in MODEL_TYPES or not isinstance(section, dict):
            raise ValueError(kind)
    except (AttributeError, ValueError):  # InputError is a ValueError
        raise InputError(f"{file}: not the config of a run; delete the folder, or give another one") from None
    return kind, section
