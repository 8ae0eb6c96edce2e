"""Scorers that read nothing: a reward model that does not beat them has learnt nothing else."""

import re
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from adaptrm.data.preferences import ResponseSet, read_pairs
from adaptrm.data.rows import BadRows, Source
from adaptrm.errors import InputError

REFUSAL = re.compile(
    r"\b(sorry|cannot|can't|can’t|unable|won't|not able|illegal|unethical|inappropriate|harmful)\b", re.I
)
TRAINING_PAIRS = 20_000  # that TF-IDF learns from at most: words of more do not change what such a scorer is worth
Scores = Sequence[float]


def length(one: ResponseSet) -> Scores:
    """Characters of each response."""
    return [float(len(text)) for text in one.responses]


def refusal_words(one: ResponseSet) -> Scores:
    """How often each response says that it will not, cannot or should not."""
    return [float(len(REFUSAL.findall(text))) for text in one.responses]


TRIVIAL: dict[str, Callable[[ResponseSet], Scores]] = {
    "longer": length,
    "shorter": lambda one: [-characters for characters in length(one)],
    "refusal words": refusal_words,
}


def fit_tfidf(source: Source) -> Callable[[ResponseSet], Scores]:
    """Bradley-Terry on the words of the responses: logistic regression on differences of TF-IDF vectors.

    Args:
        source: training pairs; the first ``TRAINING_PAIRS`` that people labelled are used.

    Raises:
        InputError: scikit-learn is not installed, or no pair has a preference.
    """
    try:
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise InputError("TF-IDF needs scikit-learn; pip install 'adaptrm[gold]'") from None
    labelled = (pair for pair in read_pairs(source, BadRows("skip")) if pair.preferred is not None)
    pairs = list(islice(labelled, TRAINING_PAIRS))
    if not pairs:
        raise InputError(f"{source}: no pair says which response is preferred; TF-IDF has nothing to learn from")
    words = TfidfVectorizer(min_df=min(2, len(pairs)), ngram_range=(1, 2), sublinear_tf=True)
    try:
        words.fit([text for pair in pairs for text in pair.responses])
    except ValueError as wrong:
        raise InputError(f"{source}: TF-IDF cannot learn from it: {wrong}") from None
    x = words.transform([p.response_a for p in pairs]) - words.transform([p.response_b for p in pairs])
    y = np.array([pair.preferred == "a" for pair in pairs])
    # Both ways round, so that both classes are there and neither side is favoured.
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000)
    model.fit(vstack([x, -x]), np.concatenate([y, ~y]))
    return lambda one: model.decision_function(words.transform(one.responses)).tolist()
