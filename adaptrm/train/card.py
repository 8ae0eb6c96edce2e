"""The model card of the folders that are written here."""

import re
from collections.abc import Sequence

from adaptrm import paths
from adaptrm.errors import printable
from adaptrm.judge.pair_prompt import TEXT
from adaptrm.train.step import Kind

# In the card of every folder that is written here; the second is of earlier ones.
MARKS = (b"tags:\n- adaptrm\n", b"tags: [adaptrm,")
CARD = """---
{matter}
---

# {title}

{what} {made} with [adaptrm](https://pypi.org/project/adaptrm/), a JAX stack that labels preference pairs by the
safety rules that tell the two responses apart.

{origin}
- Weights: {dtype}. Compute scores in float32: quantised or bfloat16 evaluation makes ties.
- Chat template: the one in this folder, with its date frozen. Score exactly what it renders.
{pad}
Limits: it reflects the judge, the rules and the pairs that it was trained with, and says nothing of texts unlike them.
"""
MERGED = """- Average of the weights, element by element ([Wortsman et al. 2022](https://arxiv.org/abs/2203.05482),
  [WiSE-FT](https://arxiv.org/abs/2109.01903); of reward models [WARM](https://arxiv.org/abs/2401.12187)):
{sources}
- Everything else is that of the first of them."""

# Task, tag, title and what it is.
ABOUT: dict[Kind, tuple[str, str, str, str]] = {
    "reward": (
        *("text-classification", "reward-model", "Reward model"),
        "A reward model: one score a conversation, higher is better; only differences at one prompt mean anything.",
    ),
    "judge": (
        *("text-generation", "judge", "Rule judge"),
        "A judge: asked about a statement on a response, it answers Yes, No or Neither.",
    ),
    "adapter": (
        *("text-classification", "rule-adapter", "Rule adapter"),
        "A rule adapter: shown a conversation and two responses, it says which rules tell them apart: a logit a rule, "
        "the largest are chosen. It reads one turn of the user:\n\n```\n" + TEXT + "\n```\n\n"
        "Messages stand as `User: ...` or `Assistant: ...`, an empty line after each; the responses in the order of "
        "their texts.",
    ),
}
Pad = tuple[str | None, int | None]  # the token and its id
# What Markdown would read as more than text, and what it would make a link or a mention of.
MARKUP = re.compile(r"[\\`*_{}\[\]()<>#|~$&!:@]|(?<=www)\.", re.IGNORECASE)
LONGEST = 200  # characters of a text from outside


def trained_card(kind: Kind, dtype: str, pad: Pad, base_model: str | None) -> str:
    """The card of a model that was trained from ``base_model``, or from random weights."""
    start = "random weights" if base_model is None else plain(name_of(base_model))
    return _card(kind, dtype, pad, "Trained", f"- Started from: {start}.", () if base_model is None else (base_model,))


def merged_card(kind: Kind, dtype: str, pad: Pad, models: Sequence[str], weights: Sequence[float]) -> str:
    """The card of an average of models."""
    sources = (f"  - {weight:g} x {plain(name_of(model))}" for model, weight in zip(models, weights, strict=True))
    return _card(kind, dtype, pad, "Merged", MERGED.format(sources="\n".join(sources)), models, ("merge",))


def _card(
    kind: Kind, dtype: str, pad: Pad, made: str, origin: str, models: Sequence[str], tags: Sequence[str] = ()
) -> str:
    from huggingface_hub import ModelCardData

    task, tag, title, what = ABOUT[kind]
    matter = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["adaptrm", tag, *tags],
        base_model=[printable(model) for model in models if on_hub(model)] or None,
    )
    pad_line = ""
    if pad[0] is not None and kind != "judge":
        pad_line = f"- Pad token: {plain(pad[0])} (id {pad[1]}); scores are read at the last token that is not pad.\n"
    return CARD.format(
        matter=matter.to_yaml(),
        title=title,
        what=what,
        made=made,
        origin=origin,
        dtype=dtype,
        pad=pad_line,
    )


def on_hub(model: str) -> bool:
    """Whether this names a model on the hub, not a path."""
    return model.count("/") == 1 and not paths.exists(model)


def name_of(path: str) -> str:
    """What a path may be called in public: its last part, with the run's name where it is of a run; not its folders."""
    parts = path.rstrip("/").split("/")
    shown = 2 if on_hub(path) or parts[-1] == "export" else 3 if parts[-2:-1] == ["checkpoints"] else 1
    return "/".join(parts[-shown:])


def plain(text: str) -> str:
    """A text from outside as one line of Markdown that shows just that."""
    shown = printable(text)
    return MARKUP.sub(r"\\\g<0>", shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}...")
