"""The model card of the folders that are written here: what the hub reads, and what people should know.

Whatever comes from outside (names of files and models, results, licenses) is shown as text, on one line; files are
called by their names alone, never by the folders of the machine that they lie on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adaptrm.card.benchmarks import eval_results, overlap_markdown, results_markdown
from adaptrm.card.files import Examples, Overlap, Pool, Result
from adaptrm.card.license import License
from adaptrm.card.markdown import data_name, model_name, on_hub, one_line, plain, table
from adaptrm.config import DataOptions, Kind, TrainOptions
from adaptrm.data.rows import hub_name
from adaptrm.judge.pair_prompt import TEXT

# In the card of every folder that is written here; the second is of earlier ones.
MARKS = (b"tags:\n- adaptrm\n", b"tags: [adaptrm,")
Pad = tuple[str | None, int | None]  # the token and its id
HEAD = """# {title}

{what}

{made} with [adaptrm](https://pypi.org/project/adaptrm/), a JAX stack that labels preference pairs by the safety rules
that tell the two responses apart.

{origin}
- Weights: {dtype}. Compute scores in float32: quantised or bfloat16 evaluation makes ties.
- Chat template: the one in this folder, with its date frozen. Score exactly what it renders.
{pad}"""
PAD = "- Pad token: {token} (id {id}); scores are read at the last token that is not pad.\n"
MERGED = """- Average of the weights, element by element ([Wortsman et al. 2022](https://arxiv.org/abs/2203.05482),
  [WiSE-FT](https://arxiv.org/abs/2109.01903); of reward models [WARM](https://arxiv.org/abs/2401.12187)):
{sources}
- Everything else is that of the first of them."""
LIMITS = """It reflects the judge, the rules and the pairs that it was trained with, and says nothing of texts unlike
them. A judge may not read every rule, people who labelled may have been wrong, and what is optimised against a model
finds what it does not see."""
# Section 1.b.i of the Llama 3.1 Community License and later ones: "or any outputs or results of the Llama Materials".
LABELLED_BY_A_MODEL = """Where a model labelled the pairs, its license may ask for more: that of Llama 3.1 and later
extends the duty of the name to models that were trained on its outputs."""


@dataclass(frozen=True)
class Words:
    """What a card says of every model of a kind.

    Attributes:
        task, tag: of the hub.
        use: what it is meant for, and what not.
    """

    task: str
    tag: str
    title: str
    what: str
    use: str


WORDS: dict[Kind, Words] = {
    "reward": Words(
        *("text-classification", "reward-model", "Reward model"),
        "A reward model: one score a conversation, higher is better; only differences at one prompt mean anything.",
        "Ranking responses to one prompt, and training by reinforcement where people look at what is rewarded. Not "
        "for judging one response by itself, and no filter that alone decides what is safe.",
    ),
    "judge": Words(
        *("text-generation", "judge", "Rule judge"),
        "A judge: asked about a statement on a response, it answers Yes, No or Neither.",
        "Saying which rules tell two responses apart, so that pairs can be labelled. Not for questions of fact, and "
        "no verdict on people.",
    ),
    "adapter": Words(
        *("text-classification", "rule-adapter", "Rule adapter"),
        "A rule adapter: shown a conversation and two responses, it says which rules tell them apart: a logit a rule, "
        "the largest are chosen. It reads one turn of the user:\n\n```\n" + TEXT + "\n```\n\n"
        "Messages stand as `User: ...` or `Assistant: ...`, an empty line after each; the responses in the order of "
        "their texts.",
        "Choosing the rules that a judge is then asked about. Not for saying which response is better.",
    ),
}
LOSSES = {
    "bradley-terry": "Bradley-Terry",
    "plackett-luce": "Plackett-Luce over best-of-n sets",
    "all-pairs": "all pairs of best-of-n sets",
}


@dataclass(frozen=True)
class About:
    """What is known of how a model came to be, and of what it is worth.

    Attributes:
        name: of the model, for the hub's tables of results.
        models: what it started from, or is the average of; a training that names none began with random weights.
        weights: of an average.
        license: of all of ``models``.
        options: of its training; None where they are not known.
    """

    name: str = "model"
    models: Sequence[str] = ()
    weights: Sequence[float] = ()
    license: License | None = None
    options: TrainOptions | None = None
    examples: Examples | None = None
    results: Sequence[Result] = ()
    overlaps: Sequence[Overlap] = ()


def model_card(kind: Kind, dtype: str, pad: Pad, about: About) -> str:
    """``README.md`` of a model's folder."""
    words, options, duty = WORDS[kind], about.options, about.license and about.license.duty
    head = HEAD.format(
        title=words.title,
        what=words.what if duty is None else f"{words.what}\n\n**{duty.shown}.**",
        made="Merged" if about.weights else "Trained",
        origin=_origin(about),
        dtype=dtype,
        pad="" if pad[0] is None or kind == "judge" else PAD.format(token=plain(pad[0]), id=pad[1]),
    )
    sections = {
        "Training data": _data(options.data, about.examples) if options else "",
        "Rules": _rules(about.examples.rules) if about.examples else "",
        "Method": _method(kind, options) if options else "",
        "Results": results_markdown(about.results),
        "Overlap of benchmarks and training data": overlap_markdown(about.overlaps) if about.overlaps else "",
        "Intended use": words.use,
        "Limits": LIMITS,
        "License": _license(about),
    }
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items() if text)
    return f"---\n{_matter(words, about)}\n---\n\n{head}{body}"


def _matter(words: Words, about: About) -> str:
    """What the hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    data = [] if about.options is None else [about.options.data, *about.options.data.mix]
    datasets = [found["name"] for one in data if one.pairs and (found := hub_name(one.pairs))]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=words.task,
        tags=["adaptrm", words.tag, *(["merge"] if about.weights else [])],
        base_model=list(dict.fromkeys(one_line(model) for model in about.models if on_hub(model))) or None,
        datasets=list(dict.fromkeys(datasets)) or None,
        **(vars(about.license) if about.license else {}),
        model_name=one_line(about.name) if about.results else None,
        eval_results=eval_results(about.results, words.task) or None,
    ).to_yaml()


def _origin(about: About) -> str:
    if about.weights:
        sources = zip(about.weights, about.models, strict=True)
        return MERGED.format(
            sources="\n".join(f"  - {weight:g} x {plain(model_name(model))}" for weight, model in sources)
        )
    unnamed = "what is not known" if about.options is None else "random weights"
    start = plain(model_name(about.models[0])) if about.models else unnamed
    named = about.options and about.options.model.checkpoint
    return f"- Started from: {start}{f', by the checkpoint {plain(model_name(named))}' if named else ''}."


def _data(options: DataOptions, examples: Examples | None) -> str:
    """Where the examples came from, by name, and how many there were."""
    rows = []
    for one, weight in ((options, 1.0), *((mix, mix.weight) for mix in options.mix)):
        labels = one.labels or getattr(one, "scores", None)
        by = "people" if labels == "human" else "" if labels is None else plain(data_name(labels))
        rows.append([plain(data_name(one.pairs or labels or "")), by, f"{weight:g}"])
    found = [table(["data", "labels", "weight"], rows)]
    if examples:
        left = (f", {plain(name.replace('_', ' '))} {n}" for name, n in examples.left.items() if n)
        found.append(f"{examples.count} {plain(examples.unit)}{''.join(left)}.")
    if options.drop_overlap:
        suites = ", ".join(plain(data_name(suite)) for suite in options.drop_overlap)
        found.append(f"Left out of them: what shares a prompt or 13 words in a row with {suites}.")
    return "\n\n".join(found)


def _rules(pool: Pool | None) -> str:
    if pool is None:
        return ""
    return (
        f"Pool {plain(pool.name)}, version {plain(pool.version)}: {pool.count} rules; SHA-256 of their ids, texts and "
        f"signs: {plain(pool.sha256)}."
    )


def _method(kind: Kind, options: TrainOptions) -> str:
    """Loss, optimizer, epochs and averaging."""
    loss, optimizer, model = options.loss, options.optimizer, options.model
    parts = {
        LOSSES[loss.kind]: True,
        "soft labels": loss.soft_labels,
        f"label smoothing {loss.label_smoothing:g}": loss.label_smoothing,
        "margins": loss.margin,
        f"centring {loss.center_rewards:g}": loss.center_rewards,
    }
    of_kind = {
        "reward": ", ".join(name for name, is_there in parts.items() if is_there),
        "judge": "cross-entropy of the answers Yes, No and Neither",
        "adapter": f"binary cross-entropy of each rule, {loss.k} a pair",
    }
    most = "" if options.max_steps is None else f", at most {options.max_steps} steps"
    lines = [
        f"Loss: {of_kind[kind]}.",
        f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule} schedule, "
        f"{optimizer.warmup_steps} steps of warmup, weight decay {optimizer.weight_decay:g}.",
        f"Epochs: {options.epochs}{most}; computed in {model.dtype}; seed {options.seed}.",
    ]
    if model.lora is not None:
        lines.append(f"Adapters (LoRA) of rank {model.lora.rank}, alpha {model.lora.alpha:g}, merged.")
    if share := model.average_with_start:
        lines.append(f"Averaged with the weights that it started from, whose share is {share:g} (WiSE-FT).")
    return "\n".join(f"- {line}" for line in lines)


def _license(about: About) -> str:
    names = ", ".join(dict.fromkeys(plain(model_name(model)) for model in about.models))
    found = []
    if about.license is None and about.models:
        found.append(f"Not known: no card of {names} states one, or they differ. Find it out before you hand this on.")
    elif about.license is not None and (duty := about.license.duty) is None:
        found.append(f"{plain(about.license.name)}, as the card of {names} states.")
    elif about.license is not None:
        found.append(
            f"[{duty.title}]({duty.text}), as the card of {names} states. By its section 1.b, where this model is "
            f'handed on, its name begins with "{duty.prefix}", "{duty.shown}" is displayed, a copy of the agreement '
            f"goes with it, and a text file named Notice says: {duty.notice}"
        )
    if about.options is not None and about.options.data.labels not in (None, "human"):
        found.append(LABELLED_BY_A_MODEL)
    return "\n\n".join(found)
