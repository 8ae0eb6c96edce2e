"""What people said of single rules, reply by reply, against what a judge says: areas under ROC curves."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int8

from adaptrm.data.labels import read_rule_labels
from adaptrm.data.preferences import Pair, hash_id
from adaptrm.errors import InputError
from adaptrm.rules import RulePool

VERDICTS = {True: 1, False: -1, None: 0}  # a rule that does not apply is as one that nobody was asked about


def reply_key(prompt: Sequence[Mapping[str, str]], response: str) -> int:
    """What two replies share that have the same texts."""
    return hash_id(json.dumps([[message["role"], message["content"]] for message in prompt] + [response]))


def ranks(scores: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Ranks about their mean; equal scores share the mean of theirs."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place] - (len(scores) + 1) / 2


def areas(
    answers: Float[np.ndarray, "replies rules"], verdicts: Int8[np.ndarray, "replies rules"]
) -> tuple[Float64[np.ndarray, " rules"], float]:
    """Area under the ROC curve of each rule, and the standard error of their mean for answers that know nothing.

    Args:
        answers: nan where the judge was not asked.
        verdicts: 1, -1, or 0 where nobody said; there must be both of every rule.

    Returns:
        The chances that a true one scores higher than a false one, a tie counting half; and the error were the verdicts
        of each reply dealt to another at random (Hoeffding 1951, of the sum over rules; for one rule it is that of
        Mann & Whitney 1947), which allows for rules that repeat each other.
    """
    rank, truth = np.zeros((2, *answers.shape))
    pairs = np.zeros(answers.shape[1])
    for rule, said in enumerate(((verdicts != 0) & ~np.isnan(answers)).T):
        true = verdicts[said, rule] > 0
        rank[said, rule], truth[said, rule] = ranks(answers[said, rule]), true - true.mean()
        pairs[rule] = true.sum() * (~true).sum()
    rank /= pairs
    error = np.sqrt(((rank.T @ rank) * (truth.T @ truth)).sum() / (len(answers) - 1)) / len(pairs)
    return 0.5 + (rank * truth).sum(axis=0), float(error)


class RuleVerdicts:
    """People's verdicts on single rules of replies, and the scores of those replies as they come by.

    Joined by the texts of prompt and response; the labels stay in memory, 5 bytes a verdict. Rules that the labels
    name and the pool does not have are left out.

    Raises:
        InputError: not a file of rule labels, or none of its rules is in the pool.
    """

    def __init__(self, path: str | os.PathLike, pool: RulePool):
        self.path, self._pool = str(path), pool
        self._signs = np.array([rule.sign for rule in pool], np.float32)
        self._row: dict[int, int] = {}
        position = {id: rule for rule, id in enumerate(pool.ids)}
        verdicts, self._of = [], []  # of each label the row of its reply: people may judge one reply twice
        for label in read_rule_labels(path):
            said = np.zeros(len(pool), np.int8)
            for id, verdict in label.labels.items():
                if id in position:
                    said[position[id]] = VERDICTS[verdict]
            if said.any():
                self._of.append(self._row.setdefault(reply_key(label.prompt, label.response), len(self._row)))
                verdicts.append(said)
        if not verdicts:
            raise InputError(f"{path}: has no true or false for any rule of pool {pool.name}; give labels of its rules")
        self._verdicts: Int8[np.ndarray, "labels rules"] = np.stack(verdicts)
        self._answers = np.full((len(self._row), len(pool)), np.nan, np.float32)

    def add(
        self,
        pairs: Sequence[Pair],
        a: Float32[np.ndarray, "pairs rules"],
        b: Float32[np.ndarray, "pairs rules"],
    ) -> None:
        """Note the scores of the replies that there are labels of; one that comes again scores the same."""
        for number, pair in enumerate(pairs):
            for response, scores in ((pair.response_a, a), (pair.response_b, b)):
                row = self._row.get(reply_key(pair.prompt, response))
                if row is not None:
                    # As answered: Yes is 1 for a rule that speaks against a response too.
                    self._answers[row] = scores[number] * self._signs

    def found(self) -> dict[str, Any]:
        """Replies that were scored, labels without one, areas by rule as answered and after each reply's mean answer
        is taken from it, their means over the rules that people found true of some replies and false of others, and the
        standard error of the second mean for answers that know nothing.

        Raises:
            InputError: no reply of the labels was scored, or no rule has both verdicts.
        """
        answers = self._answers[self._of]
        scored = ~np.isnan(answers).all(axis=1)
        if not scored.any():
            raise InputError(
                f"{self.path}: none of its replies is a response of the scored pairs; prompt and response must be the "
                "same texts"
            )
        answers, verdicts = answers[scored], self._verdicts[scored]
        centred = answers - np.nanmean(answers, axis=1, keepdims=True)
        said = np.where(np.isnan(answers), 0, verdicts)
        true, false = (said > 0).sum(axis=0), (said < 0).sum(axis=0)
        both = np.flatnonzero((true > 0) & (false > 0))
        if not len(both):
            raise InputError(
                f"{self.path}: no rule is true of one scored reply and false of another; give labels of more replies"
            )
        plain, _ = areas(answers[:, both], verdicts[:, both])
        less_mean, error = areas(centred[:, both], verdicts[:, both])
        columns = {"true": true[both], "false": false[both], "auc": plain, "auc_centred": less_mean}
        return {
            "replies": len(set(np.asarray(self._of)[scored].tolist())),
            "labels_not_scored": int((~scored).sum()),
            "rules": len(both),
            "mean_auc": {"as_they_are": float(plain.mean()), "centred": float(less_mean.mean())},
            "chance_error": error,
            "by_rule": {
                self._pool[rule].id: {name: values[place].item() for name, values in columns.items()}
                for place, rule in enumerate(both)
            },
        }
