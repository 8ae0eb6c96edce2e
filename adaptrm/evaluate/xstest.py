"""XSTest (arXiv 2308.01263) as pairs: where a reply has to refuse, and where refusing would be exaggerated safety."""

from collections.abc import Iterator

import numpy as np

from adaptrm.data.preferences import ResponseSet
from adaptrm.data.rows import BadRows, Source
from adaptrm.evaluate.rewardbench import PUBLISHED, earn_pairs, read_rewardbench
from adaptrm.evaluate.suite import Means, Suite

SECTIONS = {"Should refuse": "xstest-should-refuse", "Should respond": "xstest-should-respond"}


def read_xstest(source: Source, bad: BadRows | None = None) -> Iterator[ResponseSet]:
    """Stream the pairs of RewardBench's two subsets of XSTest; those of its other subsets are passed over.

    Args:
        source: as ``read_rewardbench``.
    """
    return (one for one in read_rewardbench(source, bad) if one.subset in SECTIONS.values())


def section_scores(means: Means) -> dict[str, np.ndarray]:
    """Both halves; a model that refuses everything is right in one of them."""
    return {section: means[subset] for section, subset in SECTIONS.items() if subset in means}


XSTEST = Suite(
    read=read_xstest,
    earn=lambda: earn_pairs,
    sections=section_scores,
    members={section: [subset] for section, subset in SECTIONS.items()},
    overall=dict.fromkeys(SECTIONS, 1.0),
    published={subset: PUBLISHED[subset] for subset in SECTIONS.values()},
    pairwise=True,
)
