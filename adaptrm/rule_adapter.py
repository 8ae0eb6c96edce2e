"""``RuleAdapter``: which rules tell the two responses of a pair apart, without asking a judge about all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from adaptrm import paths
from adaptrm.data.preferences import Pair
from adaptrm.errors import InputError
from adaptrm.hf.folder import Folder
from adaptrm.judge.pair_prompt import choice_tree
from adaptrm.train.classifier import Classifier


class RuleAdapter(Classifier):
    """A sequence classifier with a label a rule (METHOD.md section 1, step 6), its tokenizer and chat template.

    Attributes:
        rule_ids: the rules that it chooses from.
    """

    kind = "adapter"

    @classmethod
    def _labels(cls, folder: Folder) -> tuple[str, ...]:
        if folder.raw.get("problem_type") != "multi_label_classification":
            raise InputError(f"{folder.path}: is no rule adapter (problem_type: multi_label_classification)")
        return folder.label_names

    def score(self, pairs: Sequence[Pair]) -> Float32[np.ndarray, "pairs rules"]:
        """A logit for each rule; the same, to the last bit, with the responses of each pair swapped.

        Raises:
            InputError: a logit is not finite; names the pair.
        """
        trees = (choice_tree(self.chat, pair, self.pad[1]) for pair in pairs)
        logits = np.array([of_pair[0] for of_pair in self.logits(trees)], np.float32).reshape(-1, len(self.rule_ids))
        if not (finite := np.isfinite(logits).all(axis=1)).all():
            name = pairs[int(np.argmin(finite))].id
            raise InputError(f"the adapter's logits for pair {name!r} are not finite; check its weights and dtype")
        return logits

    def predict(self, pairs: Sequence[Pair], k: int = 5) -> Int32[np.ndarray, "pairs k"]:
        """Positions of the k rules with the largest logits, in descending order; of equals the first come first.

        Raises:
            InputError: there are not so many rules.
        """
        if not 1 <= k <= len(self.rule_ids):
            raise InputError(f"k is {k}; the adapter knows {len(self.rule_ids)} rules")
        return np.argsort(-self.score(pairs), axis=1, kind="stable")[:, :k].astype(np.int32)

    def tokens(self, pair: Pair) -> int:
        """How many tokens it reads of a pair."""
        return len(choice_tree(self.chat, pair, self.pad[1]))

    def describe(self) -> dict[str, Any]:
        """What the manifest of a score folder says of it.

        Raises:
            InputError: it is a run that has not been exported, so that there are no files to name.
        """
        if self._folder is None:
            raise InputError("the adapter's run has not ended; adaptrm export RUN OUT, and give --adapter OUT")
        files = (f for f in sorted(self._folder.iterdir()) if f.suffix in (".safetensors", ".json", ".jinja"))
        return {"adapter": str(self._folder), "adapter_sha256": {file.name: paths.sha256(file) for file in files}}
