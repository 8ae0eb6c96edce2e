"""A causal language model as the judge: every rule about both responses of a pair in one forward pass."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from adaptrm import paths
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.preferences import Pair
from adaptrm.data.scores import Scores
from adaptrm.hf import load_weights, open_folder
from adaptrm.judge.program import answer_leaves, decide_leaves, scores_of
from adaptrm.judge.prompts import ANSWERS, JudgePrompt, Questions
from adaptrm.models.decoder import CausalLM
from adaptrm.parallel import local_mesh
from adaptrm.parallel.rows import over_rows, pack_trees
from adaptrm.prefix_tree import PackedRows
from adaptrm.rules import RulePool
from adaptrm.selection.strategies import Selection, resolve_k


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

    def score(self, pairs: Sequence[Pair], rules: Int[np.ndarray, "pairs k"] | None = None) -> Scores:
        """Score pairs; what comes out does not depend on what else is in the batch.

        Args:
            rules: positions of the rules to ask about each pair; None asks about all. What is not asked is nan.
        """
        return self.answer(self.ask(pairs, rules))

    def score_nothing(self, prompts: Sequence[tuple[Mapping[str, str], ...]]) -> Float32[np.ndarray, "prompts rules"]:
        """The scores of an empty response to each prompt: what the judge says of a rule before it has read anything."""
        every = range(len(self.rules))
        questions = [
            (row, questions)
            for row, prompt in enumerate(prompts)
            for questions in self.prompt.reply_trees(prompt, "", every)
        ]
        packed = pack_trees([one.tree for _, one in questions], self.mesh)
        return self.answer(Asked([""] * len(prompts), questions, packed)).a

    def log_probabilities(
        self, pairs: Sequence[Pair], rules: Int[np.ndarray, "pairs k"] | None = None
    ) -> Float32[np.ndarray, "pairs 2 rules 3"]:
        """Log-probability of Yes, No and Neither, for responses A and B of each pair and each rule."""
        return self._answers(self.ask(pairs, rules))

    def select(
        self,
        pairs: Sequence[Pair],
        strategy: str = "max-discrepancy",
        k: int = 5,
        discrepancy_weight: float = 0.5,
        rules: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Selection:
        """What ``adaptrm.select`` makes of the scores, in the program that scores: only rules and margins leave it.

        Raises:
            ValueError: an argument is wrong, the template is not ``conversation-first``, whose trees hold all rules of
                a pair, or the judge's answers are not numbers (names the pair).
        """
        if self._template != "conversation-first":
            raise ValueError(f"select needs the template 'conversation-first'; this judge has {self._template!r}")
        if strategy == "evidence":
            raise ValueError("evidence needs all scores first; score the pairs and give these to adaptrm.select")
        k, fixed = resolve_k(strategy, k, discrepancy_weight, rules, len(self.rules))
        asked = self.ask(pairs)
        slots, numbers = asked.slots(len(self.rules))
        program = partial(
            decide_leaves,
            *(self._definition, self.prompt.answers, self.dtype, self._state, self._signs),
            *(np.float32(discrepancy_weight), fixed, np.uint32(seed % 2**32)),
            strategy=strategy,
            k=k,
        )
        found = over_rows((*asked.packed.arrays, slots, numbers), self.mesh, program)
        order = np.argsort(numbers[numbers >= 0])
        chosen, margin, good = (x[numbers >= 0][order] for x in found)
        if not good.all():
            name = asked.ids[int(np.argmin(good))]
            raise ValueError(f"the answers about pair {name!r} are not numbers in {self.dtype}; check the weights")
        return Selection.of(chosen, margin, strategy)

    def ask(self, pairs: Sequence[Pair], rules: Int[np.ndarray, "pairs k"] | None = None) -> "Asked":
        """The questions about some pairs, packed: what the host does, no device takes part.

        Args:
            rules: positions of the rules to ask about each pair; None asks about all.
        """
        every = range(len(self.rules))
        questions = [
            (row, questions)
            for row, pair in enumerate(pairs)
            for questions in self.prompt.pair_trees(
                *(pair.prompt, pair.response_a, pair.response_b),
                every if rules is None else [int(rule) for rule in rules[row]],
            )
        ]
        packed = pack_trees([one.tree for _, one in questions], self.mesh)
        return Asked([pair.id for pair in pairs], questions, packed, rules)

    def answer(self, asked: "Asked") -> Scores:
        """The scores of what ``ask`` has prepared."""
        found = scores_of(self._answers(asked), self._signs)
        return Scores(asked.ids, list(self.rules.ids), **found, rules=asked.rules)

    def _answers(self, asked: "Asked") -> Float32[np.ndarray, "pairs 2 rules 3"]:
        out = np.full((len(asked.ids), 2, len(self.rules), 3), np.nan, np.float32)
        answers = asked.packed.to_owners(over_rows(asked.packed.arrays, self.mesh, self.program))
        for index, (row, questions) in enumerate(asked.questions):
            for sides, of_run in zip(questions.sides, answers[index].reshape(-1, len(questions.rules), 3), strict=True):
                for side in sides:
                    out[row, side, list(questions.rules)] = of_run
        return out

    @property
    def program(self) -> Callable[..., jax.Array]:
        """Packed rows to the answers' log-probabilities at their leaves."""
        return partial(answer_leaves, self._definition, self.prompt.answers, self.dtype, self._state)

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


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions about some pairs, in rows.

    Attributes:
        ids: of the pairs.
        questions: each tree of questions, with the position of its pair.
        packed: the trees in this order.
        rules: those that each pair is asked about; None for all.
    """

    ids: list[str]
    questions: list[tuple[int, Questions]]
    packed: PackedRows
    rules: Int[np.ndarray, "pairs k"] | None = None

    def slots(self, rules: int) -> tuple[Int[np.ndarray, "rows pairs 2 rules"], Int[np.ndarray, "rows pairs"]]:
        """Where in its row each pair's leaves are, and which pair it is; -1 where a row holds no more pairs."""
        trees = [np.unique(row[row >= 0]) for row in self.packed.owner[..., 0]]
        most = 1 << (max(map(len, trees)) - 1).bit_length()  # few numbers, so that few programs are compiled
        slots = np.zeros((len(trees), most, 2, rules), np.int32)
        numbers = np.full((len(trees), most), -1, np.int32)
        for row, of_row in enumerate(trees):
            for place, tree in enumerate(of_row):
                numbers[row, place], questions = self.questions[tree]
                first = int(np.flatnonzero(self.packed.owner[row, :, 0] == tree)[0])
                for run, sides in enumerate(questions.sides):
                    start = first + run * rules
                    slots[row, place, list(sides)] = np.arange(start, start + rules)
        return slots, numbers
