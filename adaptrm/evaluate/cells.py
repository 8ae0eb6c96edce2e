"""Means of cells (a subset, a section's part), and how far they would move had other prompts been drawn."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, UInt64

RESAMPLES = 2000
# P(X <= k) of a Poisson variable with mean 1, as far as float64 tells it from 1.
POISSON = np.cumsum(np.exp(-1) / np.cumprod([1.0, *range(1, 19)]))


def draws(prompts: UInt64[np.ndarray, " prompts"]) -> Float64[np.ndarray, "prompts resamples"]:
    """How often each prompt comes in each resample: the Poisson bootstrap (Chamandy et al. 2012), by hash.

    A function of the prompt and the number of the resample alone. So nothing has to be held to draw from, all pairs of
    a prompt come and go together, and two models are compared on the same draws.
    """
    counter = np.arange(1, RESAMPLES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = _mixed(_mixed(prompts)[:, None] + counter)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.searchsorted(POISSON, uniform, side="right").astype(np.float64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Cells:
    """Sums by cell of what several scorers earn; memory grows with the cells, not with the rows.

    Args:
        scorers: how many there are.
    """

    def __init__(self, scorers: int):
        self.scorers = scorers
        self._sums: dict[str, np.ndarray] = {}  # cell -> [1 + scorers, 1 + resamples]: counts, then what is earned

    def add(
        self,
        cells: Sequence[str],
        prompts: UInt64[np.ndarray, " units"],
        values: Float64[np.ndarray, "units scorers"],
    ) -> None:
        """Count some units, each in its cell."""
        if not len(cells):
            return
        which, of = np.unique(prompts, return_inverse=True)
        weights = np.concatenate([np.ones((len(which), 1)), draws(which)], axis=1)
        earned = np.concatenate([np.ones((len(cells), 1)), values], axis=1)
        by_cell: dict[str, list[int]] = {}  # no array of names: NumPy pads all to the longest, and drops a final NUL
        for unit, cell in enumerate(cells):
            by_cell.setdefault(cell, []).append(unit)
        for cell, inside in by_cell.items():
            by_prompt = np.zeros((len(which), 1 + self.scorers))
            np.add.at(by_prompt, of[inside], earned[inside])
            found = by_prompt.T @ weights
            self._sums[cell] = self._sums[cell] + found if cell in self._sums else found

    def __contains__(self, cell: str) -> bool:
        return cell in self._sums

    def names(self) -> list[str]:
        return list(self._sums)

    def count(self, cell: str) -> int:
        return round(self._sums[cell][0, 0])

    def means(self) -> dict[str, Float64[np.ndarray, "scorers 1+resamples"]]:
        """Of each cell the mean of each scorer, and in each resample; NaN in one that does not draw from the cell."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return {cell: sums[1:] / sums[0] for cell, sums in self._sums.items()}


def interval(resampled: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval of bootstrap draws.

    None where fewer than half of them draw from every cell: a mean over cells of a row or two has no interval.
    """
    drawn = resampled[~np.isnan(resampled)]
    if 2 * len(drawn) < len(resampled):
        return None
    return [float(x) for x in np.quantile(drawn, (0.025, 0.975))]
