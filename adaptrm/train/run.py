"""``adaptrm train``: from options to a run folder with checkpoints, metrics and an exported model."""

import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from adaptrm import paths
from adaptrm.config import TrainOptions, parse_options, to_yaml
from adaptrm.data.chat import ChatTokenizer, choose_pad_token, pad_can_end
from adaptrm.data.plan import Plan, PlanOptions
from adaptrm.errors import InputError
from adaptrm.hf.cache import local_copy
from adaptrm.hf.load import Folder, abstract_model, load_weights, open_folder
from adaptrm.judge.prompts import JudgePrompt
from adaptrm.lock import hold
from adaptrm.models import CausalLM, ModelConfig, SequenceClassifier
from adaptrm.parallel import make_mesh
from adaptrm.progress import say
from adaptrm.rules import RulePool
from adaptrm.train.checkpoint import Checkpoints
from adaptrm.train.examples import judge_examples, reward_examples
from adaptrm.train.loop import run_steps
from adaptrm.train.optimizer import make_optimizer
from adaptrm.train.save import save_model
from adaptrm.train.state import init_params, init_state, param_shardings
from adaptrm.train.step import Kind, make_step
from adaptrm.yaml_text import read_yaml

MODEL_TYPES = {"judge": CausalLM, "reward": SequenceClassifier}
EXAMPLES = "examples.sha256"
UNITS = {"judge": "replies", "reward": "pairs"}
# Options that a run may change when it goes on: they do not touch what is computed.
FREE = ("mesh", "checkpoint", "log_every_steps")


def train(kind: Kind, options: TrainOptions, out: str | os.PathLike) -> dict[str, Any]:
    """Train a judge or a reward model; started again with the same folder it goes on.

    Restore precedence: the run's own checkpoint, then ``model.pretrained``, then random weights.

    Args:
        out: the run folder: config.yaml, metrics.jsonl, checkpoints/, and at the end export/.

    Returns:
        Steps, examples, rows skipped, examples dropped and truncated, parameters, share of padding.

    Raises:
        InputError: options, data or the folder cannot be used.
        TrainingFailed: a loss or gradient is not finite.
    """
    first = jax.process_index() == 0
    if jax.process_count() > 1 and not paths.is_local(out):
        raise InputError(f"{out}: several processes write one run together; give a folder that all of them share")
    options = _from_anywhere(options)
    with hold(out) if first else nullcontext():
        if first:
            _check_claim(out, kind, options)
        mesh = _mesh(options)
        start = start_of(kind, options)
        definition, params = start.params(mesh, options.seed)
        if kind == "judge":
            if options.data.rules is None:
                raise InputError("data.rules is missing: give the pool that the rule labels are of (--rules)")
            prompt = JudgePrompt(start.chat, RulePool.load(options.data.rules), options.data.template)
            (store, left), answers = judge_examples(options.data, prompt), prompt.answers
        else:
            (store, left), answers = reward_examples(options.data, start.chat, start.pad[1]), None
        plan = Plan(store.lengths, store.leaves, _plan_options(options, mesh), options.epochs)
        steps = plan.steps_per_epoch * options.epochs
        steps = min(steps, options.max_steps or steps)
        step_fn = make_step(
            kind, definition, options.optimizer, steps, answers, options.model.dtype, options.model.remat
        )
        state = init_state(params, make_optimizer(options.optimizer, steps), mesh)
        if first:  # only now: options that led to an error above hold no folder
            say(f"{len(store)} {UNITS[kind]}, {steps} steps of {plan.rows_per_step} rows, {plan.padding:.1%} padding")
            _check_examples(out, store.digest)
            _claim(out, kind, options, store.digest)
        state = run_steps(step_fn, state, store, plan, mesh, options, steps, out, UNITS[kind])
        save_model(paths.join(out, "export"), state.params, start.raw, start.chat, start.pad, start.name)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    made = {"run": str(out), "steps": steps, UNITS[kind]: len(store), **left}
    return made | {"parameters": count, "padding": plan.padding}


def _from_anywhere(options: TrainOptions) -> TrainOptions:
    """Local paths from the root on, so that a run goes on and is exported from any working folder."""

    def placed(path: str | None, found=os.path.isfile) -> str | None:
        is_name = path is None or path == "human"  # as is what cannot be found: of the hub, of a pool
        return path if is_name or not found(path) else os.path.abspath(path)

    model, data, scratch = options.model, options.data, options.model.scratch
    if scratch is not None:
        scratch = replace(scratch, tokenizer=placed(scratch.tokenizer, os.path.isdir))
    model = replace(model, pretrained=placed(model.pretrained, os.path.isdir), scratch=scratch)
    data = replace(data, pairs=placed(data.pairs, os.path.exists), labels=placed(data.labels), rules=placed(data.rules))
    return replace(options, model=model, data=data)


def _claim(out: str | os.PathLike, kind: Kind, options: TrainOptions, examples: str) -> None:
    """Write down what this run is: its options and the hash of its examples."""
    for name, content in (("config.yaml", to_yaml(kind, options)), (EXAMPLES, examples + "\n")):
        paths.write_bytes(paths.join(out, name), content.encode())


def _check_claim(out: str | os.PathLike, kind: Kind, options: TrainOptions) -> None:
    """Raise where the folder holds another run than this one."""
    file = paths.join(out, "config.yaml")
    if not paths.exists(file):
        return
    stored_kind, stored = _read_run(file)
    mine = read_yaml(to_yaml(kind, options), "options")[kind]
    if stored_kind != kind:
        raise InputError(f"{out}: holds a run of train {stored_kind}; give another --out")
    for key, value in mine.items():
        if key not in FREE and stored.get(key) != value:
            raise InputError(f"{out}: holds a run with another {key}; give another --out, or delete the folder")


def _check_examples(out: str | os.PathLike, examples: str) -> None:
    """Raise where a run would go on with other data than it began with."""
    file = paths.join(out, EXAMPLES)
    if paths.exists(file) and paths.read_bytes(file).decode("utf-8", "replace").strip() != examples:
        raise InputError(
            f"{out}: pairs, labels, rules or tokenizer have changed since this run began; give another --out"
        )


def _read_run(file: str) -> tuple[Kind, dict[str, Any]]:
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


def _mesh(options: TrainOptions) -> Mesh:
    try:
        return make_mesh(**asdict(options.mesh))
    except ValueError as wrong:
        raise InputError(f"{wrong}; change the mesh section of the config") from None


def _plan_options(options: TrainOptions, mesh: Mesh) -> PlanOptions:
    data = options.data
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if data.exact_batch and data.pairs_per_step is None:
        raise InputError("data.exact_batch needs data.pairs_per_step")
    if data.exact_batch:  # as many rows as the pairs need, so that each device has the same number
        return PlanOptions(data.row_length, ways, data.pairs_per_step, options.seed)
    if data.pairs_per_step is not None:
        raise InputError("data.pairs_per_step needs data.exact_batch: true; without it a step is data.rows_per_step")
    if data.rows_per_step % ways:
        raise InputError(f"data.rows_per_step is {data.rows_per_step}; it must be a multiple of data x fsdp = {ways}")
    return PlanOptions(data.row_length, data.rows_per_step, None, options.seed)


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
    kind, section = _read_run(file)
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
