"""A causal language model as the judge: every rule about both responses of a pair in one forward pass."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32

from adaptrm import paths
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.preferences import Pair
from adaptrm.data.scores import Scores
from adaptrm.hf import load_weights, open_folder
from adaptrm.judge.prompts import ANSWERS, JudgePrompt, Questions
from adaptrm.models.decoder import CausalLM
from adaptrm.models.heads import answer_log_probabilities, at_leaves
from adaptrm.parallel import local_mesh, read_leaves
from adaptrm.prefix_tree import PrefixTree
from adaptrm.rules import RulePool


class Judge:
    """Scores pairs against the rules of a pool.

    Attributes:
        rules: the pool.
        prompt: builds the judge's questions.
    """

    def __init__(
        self,
        folder: Path,
        definition,
        state,
        chat: ChatTokenizer,
        rules: RulePool,
        template: str,
        dtype: str,
        mesh: Mesh,
    ):
        self.rules, self.prompt, self.dtype, self.mesh = rules, JudgePrompt(chat, rules, template), dtype, mesh
        self._folder, self._template = folder, template
        self._definition, self._state = definition, state
        self._signs = np.array([rule.sign for rule in rules], np.float32)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        rules: RulePool,
        template: str = "conversation-first",
        dtype: str = "float32",
        mesh: Mesh | None = None,
        quantize: str | None = None,
    ) -> "Judge":
        """A Hugging Face folder of a causal language model, a hub name, or a run of ``train judge``.

        Args:
            dtype: of the parameters and the computation.
            mesh: None takes all devices of this process.
            quantize: ``int8`` keeps the projections of the layers in int8, with a scale an output; they are multiplied
                in ``dtype``. It needs qwix, of the extra ``int8``.

        Raises:
            InputError: the folder, its config, weights, tokenizer or chat template cannot be used.
        """
        folder = open_folder(model)
        mesh = mesh or local_mesh()
        definition, state, _ = load_weights(folder, CausalLM, mesh, dtype=dtype, quantize=quantize)
        chat = ChatTokenizer.from_folder(folder.path)
        return cls(folder.path, definition, state, chat, rules, template, dtype, mesh)

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Score pairs; what comes out does not depend on what else is in the batch."""
        log_p = self.log_probabilities(pairs)
        return scores_from_log_probabilities(log_p, self._signs, [pair.id for pair in pairs], list(self.rules.ids))

    def log_probabilities(self, pairs: Sequence[Pair]) -> Float32[np.ndarray, "pairs 2 rules 3"]:
        """Log-probability of Yes, No and Neither, for responses A and B of each pair and each rule."""
        asked = self.questions(pairs)
        out = np.empty((len(pairs), 2, len(self.rules), 3), np.float32)
        for index, leaves in self.read_leaves([questions.tree for _, questions in asked]).items():
            row, questions = asked[index]
            for sides, answers in zip(questions.sides, leaves.reshape(-1, len(questions.rules), 3), strict=True):
                for side in sides:
                    out[row, side, list(questions.rules)] = answers
        return out

    def questions(self, pairs: Sequence[Pair]) -> list[tuple[int, Questions]]:
        """All questions about some pairs, each tree of them with the position of its pair."""
        every = range(len(self.rules))
        return [
            (row, questions)
            for row, pair in enumerate(pairs)
            for questions in self.prompt.pair_trees(pair.prompt, pair.response_a, pair.response_b, every)
        ]

    def read_leaves(self, trees: Sequence[PrefixTree]) -> dict[int, Float32[np.ndarray, "leaves 3"]]:
        """Answer log-probabilities at the leaves of each tree."""
        return read_leaves(
            trees, self.mesh, partial(answer_leaves, self._definition, self.prompt.answers, self.dtype, self._state)
        )

    def special_strings(self, pairs: Sequence[Pair]) -> int:
        """How many strings of some pairs look like special tokens; they stay text."""
        said = (m["content"] for pair in pairs for m in (*pair.conversation("a"), pair.conversation("b")[-1]))
        return sum(map(self.prompt.chat.special_strings, said))

    def describe(self) -> dict[str, Any]:
        """What the manifest of a score folder says of where the scores come from."""
        files = (f for f in sorted(self._folder.iterdir()) if f.suffix in (".safetensors", ".json", ".jinja"))
        return {
            "model_sha256": {file.name: paths.sha256(file) for file in files},
            "template": self._template,
            "answer_token_ids": dict(zip(ANSWERS, map(list, self.prompt.answers), strict=True)),
            "answer_spellings_skipped": self.prompt.skipped,
        }


@partial(jax.jit, static_argnums=(0, 1, 2))
def answer_leaves(definition, answers, dtype, state, tokens, positions, subtree_end, leaves):
    """Answer log-probabilities ``[rows, leaves, 3]`` of packed rows: the step of scoring."""
    model = nnx.merge(definition, state)
    hidden = model.model(tokens, positions, subtree_end, jnp.dtype(dtype))
    return answer_log_probabilities(at_leaves(hidden, leaves), model.unembedding, answers)


def scores_from_log_probabilities(
    log_p: Float32[np.ndarray, "pairs 2 rules 3"],
    signs: Float32[np.ndarray, " rules"],
    ids: list[str],
    rule_ids: list[str],
) -> Scores:
    """Scores, relevance, log-odds and label mass from the answers' log-probabilities."""
    top = log_p.max(axis=-1, keepdims=True)
    unnormalised = np.exp(log_p - top)
    shares = unnormalised / unnormalised.sum(axis=-1, keepdims=True, dtype=np.float32)
    mass = np.minimum(np.exp(log_p).sum(axis=-1, dtype=np.float32), np.float32(1))
    # The log-odds of an answer with probability 0 is infinite; the largest float keeps the file readable by all.
    log_odds = np.nan_to_num(log_p[..., 0] - log_p[..., 1])
    scores = (shares[..., 0] - shares[..., 1]) * signs
    relevance = (1 - shares[..., 2]).mean(axis=1, dtype=np.float32)
    return Scores(
        ids,
        rule_ids,
        a=scores[:, 0],
        b=scores[:, 1],
        relevance=np.clip(relevance, 0, 1),
        log_odds_a=log_odds[:, 0] * signs,
        log_odds_b=log_odds[:, 1] * signs,
        label_mass_a=mass[:, 0],
        label_mass_b=mass[:, 1],
    )
