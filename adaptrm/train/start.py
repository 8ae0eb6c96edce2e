"""What a run starts from: tokenizer, config, pad token and weights that its options name."""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.card.files import Examples, read_file
from adaptrm.card.license import license_of
from adaptrm.card.page import About
from adaptrm.config import Kind, ModelOptions, TrainOptions, parse_options
from adaptrm.data.chat import ChatTokenizer, choose_pad_token, pad_can_end
from adaptrm.errors import InputError
from adaptrm.hf.cache import local_copy
from adaptrm.hf.folder import Folder, open_folder
from adaptrm.hf.load import abstract_model, load_weights
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.progress import say
from adaptrm.rules import RulePool
from adaptrm.train.checkpoint import METADATA, Checkpoints, find, stored_config
from adaptrm.train.lora import merged, with_adapters
from adaptrm.train.state import init_params, param_shardings, trained_and_frozen
from adaptrm.yaml_text import read_yaml

EXAMPLES = "examples.json"  # what a run's card says of its examples
MODEL_TYPES = {"judge": CausalLM, "reward": SequenceClassifier, "adapter": SequenceClassifier}


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        name: for the model card.
        raw: its ``config.json``; ``config`` is that with the vocabulary that the pad token needs.
        pad: pad token and its id.
        folder: of the pretrained weights; None where they are random.
        model: the options; ``model.checkpoint`` is the run or checkpoint whose parameters come before both.
    """

    kind: Kind
    name: str | None
    chat: ChatTokenizer
    raw: dict[str, Any]
    config: ModelConfig
    pad: tuple[str | None, int | None]
    folder: Folder | None
    model: ModelOptions

    @property
    def named(self) -> str | None:
        return self.model.checkpoint

    @property
    def num_labels(self) -> int:
        """Of the head of a classifier."""
        return len(self.model.rule_ids) or 1

    def params(self, mesh: Mesh, seed: int, resumed: bool = False) -> tuple[nnx.GraphDef, nnx.State]:
        """Definition and parameters on the mesh; shapes alone of those that a run's own checkpoint holds.

        In float32; with adapters, the model under them in the dtype of the computation.
        """
        if self.model.lora is None:
            return self._shapes(mesh) if resumed else self._plain(mesh, seed, "float32")
        _, base = self._plain(mesh, seed, self.model.dtype)
        definition, params = with_adapters(self._type, self.config, base, self.model.lora, seed, mesh, self.num_labels)
        if not resumed:
            return definition, params
        trained, frozen = trained_and_frozen(params)
        return definition, nnx.merge_state(jax.tree.map(_shape, trained), frozen)

    @property
    def _type(self):
        return MODEL_TYPES[self.kind]

    def _plain(self, mesh: Mesh, seed: int, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
        """The model that training starts from, without adapters."""
        if self.named is not None:
            definition, params = open_run(self.named).trained(self.named, mesh)
            return definition, jax.tree.map(lambda x: x.astype(dtype), params)
        if self.folder is None:
            return init_params(self._type, self.config, seed, mesh, self.num_labels)
        options = dict(dtype=dtype, new_head_seed=seed, vocab_size=self.config.vocab_size, num_labels=self.num_labels)
        return load_weights(self.folder, self._type, mesh, **options)[:2]

    def _shapes(self, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
        definition, abstract = abstract_model(self._type, self.config, self.num_labels)
        places = param_shardings(definition, abstract, mesh)
        shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        return definition, jax.tree.map(shape, abstract, places)

    def trained(self, run: str | os.PathLike, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
        """Definition and parameters of a run's latest checkpoint, or of the one that is named, adapters merged."""
        folder, step = find(run)
        if step is None:
            raise InputError(f"{run}: has no whole checkpoint yet; start the same adaptrm train again")
        definition, params = self.params(mesh, 0, resumed=True)
        like, frozen = trained_and_frozen(params)
        with Checkpoints(folder, step=step) as checkpoints:
            params = nnx.merge_state(checkpoints.restore_params(like), frozen)
        return self._without_adapters(definition, params)

    def checkpoint(self, run: str | os.PathLike, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
        """What an export of a run's latest checkpoint, or of the one that is named, holds."""
        definition, params = self.trained(run, mesh)
        return definition, self._averaged(params, mesh)

    def exported(self, definition: nnx.GraphDef, params: nnx.State, mesh: Mesh) -> nnx.State:
        """What an export of trained parameters holds: adapters merged, averaged with the start where options say so."""
        return self._averaged(self._without_adapters(definition, params)[1], mesh)

    def _without_adapters(self, definition: nnx.GraphDef, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
        return (definition, params) if self.model.lora is None else merged(definition, params)

    def _averaged(self, params: nnx.State, mesh: Mesh) -> nnx.State:
        """``(1 - w) trained + w start`` (Wortsman et al. 2022, WiSE-FT), but for a head that the start did not have."""
        if not (share := self.model.average_with_start):
            return params
        start = dict(nnx.to_flat_state(self._plain(mesh, 0, "float32")[1]))
        if self.named is None and not self.folder.is_classifier:
            start.pop(("score", "weight"), None)
        mix = jax.jit(lambda trained, start: (1 - share) * trained + share * start, donate_argnums=0)
        return nnx.from_flat_state(
            [
                (path, param.replace(mix(param[...], start.pop(path)[...]) if path in start else param[...]))
                for path, param in nnx.to_flat_state(params)
            ]
        )


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def open_run(run: str | os.PathLike) -> Start:
    """What the training of a run folder, or of one checkpoint of it, started from.

    Raises:
        InputError: this is neither.
    """
    return start_of(*read_options(run))


def is_run(model: str | os.PathLike) -> bool:
    """Whether this is a run folder, or one checkpoint of it."""
    return any(paths.exists(paths.join(model, name)) for name in ("config.yaml", METADATA))


def about_run(start: Start, options: TrainOptions, run: str | os.PathLike) -> About:
    """What the card of a run's model says of it."""
    file = paths.join(find(run)[0].rpartition("/")[0], EXAMPLES)
    return About(
        models=[] if start.name is None else [start.name],
        license=license_of(start.folder and start.folder.path),
        options=options,
        examples=read_file(file, Examples) if paths.exists(file) else None,  # earlier runs have none
    )


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


def with_rule_ids(kind: Kind, options: TrainOptions) -> TrainOptions:
    """With the rules of ``data.rules`` as the labels of an adapter, so that its run knows them without that file.

    Raises:
        InputError: no pool, or what it starts from chooses among other rules.
    """
    if kind != "adapter":
        if options.model.rule_ids:
            raise InputError(f"model.rule_ids is of adapters; train {kind} takes none")
        return options
    if options.data.rules is None:
        raise InputError("data.rules is missing: give the pool that an adapter chooses from (--rules)")
    ids = RulePool.load(options.data.rules).ids
    sources = {options.data.rules: options.model.rule_ids}
    if (named := options.model.checkpoint) is not None:
        sources[named] = read_options(named)[1].model.rule_ids
    for source, others in sources.items():
        if others and others != ids:
            raise InputError(f"{source}: has other rules than the adapter's {len(ids)}; give the same pool (--rules)")
    return replace(options, model=replace(options.model, rule_ids=ids))


def pinned(options: TrainOptions, out: str | os.PathLike) -> TrainOptions:
    """With ``model.checkpoint`` the very checkpoint that a run names now, or named when ``out`` was begun.

    What a run starts from must not change under it, and its adapters and averages need it to the end.
    """
    if (named := options.model.checkpoint) is None:
        return options
    folder, step = find(named)
    if step is None:
        raise InputError(f"{named}: has no whole checkpoint yet; start the same adaptrm train again")
    checkpoint, config = paths.join(folder, str(step)), paths.join(out, "config.yaml")
    if checkpoint != str(named).rstrip("/") and paths.exists(config):
        begun = (read_run(config)[1].get("model") or {}).get("checkpoint")
        if str(begun).rpartition("/")[0] == folder:
            checkpoint = begun
    return replace(options, model=replace(options.model, checkpoint=checkpoint))


def start_of(kind: Kind, options: TrainOptions) -> Start:
    """Tokenizer, config, pad token and weights that the options name."""
    if (options.model.pretrained is None) == (options.model.scratch is None):
        raise InputError("give one of model.pretrained (--model) and model.scratch")
    for name, is_set in (("lora", options.model.lora), ("average_with_start", options.model.average_with_start)):
        if is_set and options.model.pretrained is None and options.model.checkpoint is None:
            raise InputError(f"model.{name} needs weights to start from; give model.pretrained (--model)")
    if (scratch := options.model.scratch) is not None:
        chat = ChatTokenizer.from_folder(local_copy(scratch.tokenizer))
        pad = _pad(kind, chat, None)
        sizes = {k: v for k, v in asdict(scratch).items() if k != "tokenizer"}
        # Tied, as small models are: their vocabulary would be most of their parameters.
        config = ModelConfig(vocab_size=chat.vocab_size, tie_word_embeddings=True, **sizes)
        config.check("model.scratch")
        return Start(kind, None, chat, config.to_hf(), config, pad, None, options.model)
    folder = open_folder(options.model.pretrained)
    if kind == "adapter" and folder.is_classifier and folder.label_names != options.model.rule_ids:
        raise InputError(
            f"{options.model.pretrained}: has other labels than the {len(options.model.rule_ids)} rules; an adapter "
            "starts from a language model, or from an adapter of the same rules"
        )
    chat = ChatTokenizer.from_folder(folder.path)
    pad = _pad(kind, chat, folder.pad_token_id if folder.is_classifier else None)
    config = replace(folder.config, vocab_size=max(folder.config.vocab_size, (pad[1] or 0) + 1))
    return Start(kind, options.model.pretrained, chat, folder.raw, config, pad, folder, options.model)


def _pad(kind: Kind, chat: ChatTokenizer, stored: int | None) -> tuple[str | None, int | None]:
    """A judge keeps its tokenizer's pad token, a classifier its own; a new classifier gets a safe one."""
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
