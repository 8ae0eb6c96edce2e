"""What is true about maximum discrepancy, as code to measure it with (METHOD.md section 2).

Z in {-1, +1} is the hidden preference, d the discrepancies of R rules, and a label is the sign of a sum of some of
them. The statement: if d = a Z + sigma * noise with one a, one sigma and independent symmetric noise whose
log-likelihood ratio l does not fall as d grows, then of all selections of one rule that look at the magnitudes |d|
alone, the largest gives the label that tells most of Z. If l is linear, the k largest do so for every k, with a sum
vote. Both follow magnitude by magnitude: |d| is independent of Z, and given |d| = m a sign is right with probability
sigmoid(l(m)). ``WORLDS`` are the settings beyond it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product

import numpy as np
from jaxtyping import Bool, Float64, Int8, Int64

RULES, K = 100, 5
PART = 20_000  # pairs that are sampled, and fitted by EM, together


@dataclass(frozen=True, eq=False)
class Noise:
    """A symmetric law of unit variance.

    Attributes:
        edge: its values lie within plus and minus this.
        monotone: whether l(d), the log-likelihood ratio of +a to -a, nowhere falls as d grows.
        linear: whether l is linear in d.
    """

    sample: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    log_density: Callable[[np.ndarray], np.ndarray]
    cdf: Callable[[np.ndarray], np.ndarray]
    monotone: bool
    linear: bool
    edge: float = math.inf


_erf = np.vectorize(math.erf, otypes=[float])
_EDGE = math.sqrt(3)
NOISES = {
    "Gaussian": Noise(
        sample=lambda rng, shape: rng.standard_normal(shape),
        log_density=lambda x: -(x**2 + math.log(2 * math.pi)) / 2,
        cdf=lambda x: (1 + _erf(x / math.sqrt(2))) / 2,
        monotone=True,
        linear=True,
    ),
    "Laplace": Noise(
        sample=lambda rng, shape: rng.laplace(scale=1 / math.sqrt(2), size=shape),
        log_density=lambda x: -math.sqrt(2) * np.abs(x) - math.log(2) / 2,
        cdf=lambda x: (1 - np.sign(x) * np.expm1(-math.sqrt(2) * np.abs(x))) / 2,
        monotone=True,
        linear=False,
    ),
    "uniform": Noise(
        sample=lambda rng, shape: rng.uniform(-_EDGE, _EDGE, shape),
        log_density=lambda x: np.where(np.abs(x) <= _EDGE, -math.log(2 * _EDGE), -np.inf),
        cdf=lambda x: np.clip((x + _EDGE) / (2 * _EDGE), 0, 1),
        monotone=True,
        linear=False,
        edge=_EDGE,
    ),
    # t with 3 degrees of freedom has variance 3; divided by its root, its density is 2 / pi / (1 + x^2)^2.
    "Student t3": Noise(
        sample=lambda rng, shape: rng.standard_t(3, shape) / math.sqrt(3),
        log_density=lambda x: math.log(2 / math.pi) - 2 * np.log1p(x**2),
        cdf=lambda x: 1 / 2 + (x / (1 + x**2) + np.arctan(x)) / math.pi,
        monotone=False,
        linear=False,
    ),
}


def information(accuracy: float | np.ndarray) -> np.ndarray:
    """Mutual information, in bits, of the preference and a label that is right so often, whichever the preference."""
    chances = np.stack([np.asarray(accuracy, float), 1 - np.asarray(accuracy, float)])
    return 1 + (chances * np.log2(np.where(chances > 0, chances, 1))).sum(axis=0)


def log_ratio(noise: Noise, d: np.ndarray, strength: float, scale: float = 1.0) -> np.ndarray:
    """l(d) = log p(d | Z = +1) - log p(d | Z = -1); nan where neither gives d. Gaussian: 2 a d / sigma^2."""
    with np.errstate(invalid="ignore"):
        return noise.log_density((d - strength) / scale) - noise.log_density((d + strength) / scale)


def rank_accuracy(noise: Noise, strength: float, rules: int, scale: float = 1.0) -> Float64[np.ndarray, " rules"]:
    """How often the sign of the rule with the largest |d| is right, of that with the second largest, and so on.

    By quadrature: that one rule has d = m, and of the others ``larger`` have a larger magnitude and the rest a smaller
    one, has the density f(m - a) C(R - 1, larger) (1 - G(m))^larger G(m)^(R - 1 - larger), for each of R rules, where
    f is the density of the noise and G the distribution of |d|.
    """
    shift = strength / scale
    m, weight = _half_line([shift, abs(noise.edge - shift), noise.edge + shift])
    above = noise.cdf(shift - m) + noise.cdf(-shift - m)
    below = noise.cdf(m - shift) - noise.cdf(-shift - m)
    right = np.exp(noise.log_density(m - shift)) * weight
    ways = [rules * math.comb(rules - 1, larger) for larger in range(rules)]
    return np.array([ways[i] * (right * above**i * below ** (rules - 1 - i)).sum() for i in range(rules)])


def _half_line(breaks: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights that integrate from 0 to infinity what is smooth between the breaks."""
    # The half-line is the unit interval of t with m = t / (1 - t), on which the tail of t3 is smooth too.
    ends = np.array(sorted({0.0, 1.0} | {x / (1 + x) for x in breaks if x < math.inf}))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = (ends[1:] - ends[:-1])[:, None] / 2
    t = (ends[:-1, None] + half * (1 + nodes)).ravel()
    return t / (1 - t), (half * weights).ravel() / (1 - t) ** 2


@dataclass(frozen=True, eq=False)
class RankSets:
    """How often the sum vote of the rules at k ranks of |d| is right, for every set of k ranks, from one simulation.

    Attributes:
        sets: the ranks, 0 the largest |d|; the first set is that of the k largest.
        accuracy: over all draws.
        best: position of the set that is best on the first half of the draws.
        best_accuracy: its accuracy on the other half, which did not choose it.
        gain: what it is better than the k largest by, on the other half.
        gain_error: paired standard error of the gain.
    """

    sets: Int64[np.ndarray, "sets k"]
    accuracy: Float64[np.ndarray, " sets"]
    best: int
    best_accuracy: float
    gain: float
    gain_error: float


def rank_sets(rules: int, k: int) -> Int64[np.ndarray, "sets k"]:
    return np.array(list(combinations(range(rules), k)))


def simulate_rank_sets(
    noise: Noise, k: int, rng: np.random.Generator, draws: int, rules: int = 8, strength: float = 0.3
) -> RankSets:
    """Brute force over all sets of k ranks, at unit noise; for few rules."""
    sets = rank_sets(rules, k)
    member = np.zeros((rules, len(sets)))
    member[sets, np.arange(len(sets))[:, None]] = 1
    right = []
    for start in range(0, draws, PART):
        # By symmetry as often right as with Z = -1.
        d = strength + noise.sample(rng, (min(PART, draws - start), rules))
        ranked = np.take_along_axis(d, np.argsort(-np.abs(d), axis=1), axis=1)
        right.append(ranked @ member > 0)
    right = np.concatenate(right)
    chooses, judges = np.array_split(right, 2)
    best = int(chooses.mean(axis=0).argmax())
    gains = judges[:, best].astype(float) - judges[:, 0]
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    return RankSets(sets, right.mean(axis=0), best, judges[:, best].mean(), gains.mean(), error)


def accuracy_given_magnitudes(
    magnitudes: Float64[np.ndarray, "draws rules"],
    sets: Int64[np.ndarray, "sets k"],
    noise: Noise,
    strength: float,
    scale: float = 1.0,
) -> Float64[np.ndarray, "draws sets"]:
    """How often the sum vote of each set of rules is right where all |d| are known: exact, over all their signs.

    If on no draw a set is better than the first, no selection that looks at magnitudes alone is.
    """
    right = (1 / (1 + np.exp(-log_ratio(noise, magnitudes, strength, scale))))[:, sets]
    size = magnitudes[:, sets]
    total = np.zeros(right.shape[:2])
    for signs in product((-1, 1), repeat=sets.shape[1]):
        chance = np.where(np.array(signs) > 0, right, 1 - right).prod(axis=-1)
        total += chance * ((size * signs).sum(axis=-1) > 0)
    return total


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.choice([-1.0, 1.0], shape)


@dataclass(frozen=True, eq=False)
class World:
    """Pairs with a hidden preference Z and discrepancies d = a Z + sigma * noise + factors @ loadings.

    Attributes:
        strength: a of each rule; the hidden truth about the rules, as are the next two.
        scale: sigma of each rule.
        loadings: of factors that several rules share and that are independent of Z.
        factor: the law of each factor, unit variance.
        active: if given, each pair has so many rules, drawn anew, of the given strength; the others have none.
        base: if given, x = d / 2 moves the log-odds of two scores up and down from a point common to both, with this
            standard deviation over pairs and rules, and the discrepancy is that of the scores: judges saturate at +-1.
    """

    strength: Float64[np.ndarray, " rules"] = field(default_factory=lambda: np.full(RULES, 0.15))
    scale: Float64[np.ndarray, " rules"] = field(default_factory=lambda: np.ones(RULES))
    noise: Noise = NOISES["Gaussian"]
    loadings: Float64[np.ndarray, "factors rules"] | None = None
    factor: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = _normal
    active: int | None = None
    base: float | None = None

    def sample(
        self, rng: np.random.Generator, pairs: int
    ) -> tuple[Int8[np.ndarray, " pairs"], Float64[np.ndarray, "pairs rules"]]:
        """The hidden preference of each pair, +1 or -1, and its discrepancies."""
        preference = rng.choice(np.array([-1, 1], np.int8), pairs)
        shape = (pairs, len(self.strength))
        d = self.scale * self.noise.sample(rng, shape)
        if self.active is None:
            d += self.strength * preference[:, None]
        else:
            chosen = _smallest(rng.random(shape), self.active)
            signal = np.take_along_axis(d, chosen, axis=1) + self.strength[chosen] * preference[:, None]
            np.put_along_axis(d, chosen, signal, axis=1)
        if self.loadings is not None:
            d += self.factor(rng, (pairs, len(self.loadings))) @ self.loadings
        if self.base is not None:
            base = self.base * rng.standard_normal(shape)
            d = np.tanh((base + d) / 2) - np.tanh((base - d) / 2)
        return preference, d

    @cached_property
    def covariance(self) -> Float64[np.ndarray, "rules rules"]:
        """Of the discrepancies given Z, before scores saturate."""
        own = np.diag(self.scale**2)
        return own if self.loadings is None else own + self.loadings.T @ self.loadings

    @property
    def independent(self) -> bool:
        """Whether rules are independent given Z."""
        return self.loadings is None

    @cached_property
    def weights(self) -> Float64[np.ndarray, " rules"] | None:
        """The best linear weights, Sigma^-1 a, up to a factor; None where each pair has its own."""
        return None if self.active is not None else np.linalg.solve(self.covariance, self.strength)


def _first(count: int, value: float, others: float) -> np.ndarray:
    return np.where(np.arange(RULES) < count, value, others)


WORLDS = {
    "alike": World(),
    "sparse 8": World(strength=np.full(RULES, 0.8), scale=np.full(RULES, 0.3), active=8),
    "sparse 3": World(strength=np.full(RULES, 0.6), scale=np.full(RULES, 0.3), active=3),
    "noisy 20": World(scale=_first(20, 1.5, 0.3)),
    "junk 20": World(strength=_first(20, 0.0, 0.15), scale=_first(20, 1.5, 0.3)),
    "correlated": World(
        scale=np.full(RULES, math.sqrt(0.2)), loadings=math.sqrt(0.8) * np.kron(np.eye(10), np.ones(10))
    ),
    "opposed 10": World(strength=_first(10, -0.4, 0.15), scale=np.full(RULES, 0.5)),
    "heavy tails": World(noise=NOISES["Student t3"]),
    "nuisance on half": World(loadings=_first(50, 0.3, 0.0)[None], factor=_signs),
    "nuisance on all": World(loadings=np.full((1, RULES), 0.3), factor=_signs),
    "saturating": World(base=2.0),
}


def linear_accuracy(world: World, weights: Float64[np.ndarray, " rules"]) -> float:
    """How often sign(w . d) is right: exact, under Gaussian noise.

    Raises:
        ValueError: noise is not Gaussian, scores saturate, or each pair has its own rules and the weights differ.
    """
    if not world.noise.linear or world.base is not None:
        raise ValueError("a vote is exact for Gaussian noise and scores that do not saturate")
    if world.active is not None and np.ptp(weights):
        raise ValueError("where each pair has its own rules a vote is exact for equal weights")
    share = 1 if world.active is None else world.active / len(weights)
    mean, variance = share * weights @ world.strength, ((weights * world.scale) ** 2).sum()
    moves = np.zeros(1)
    if world.loadings is not None:
        loading = world.loadings @ weights
        if world.factor is _signs:
            moves = np.array([np.dot(signs, loading) for signs in product((-1, 1), repeat=len(loading))])
        else:
            variance += loading @ loading
    return float(NOISES["Gaussian"].cdf((mean + moves) / math.sqrt(variance)).mean())


Label = Int8[np.ndarray, " pairs"]


def _smallest(x: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k smallest of each row, in any order."""
    return np.argpartition(x, k - 1, axis=1)[:, :k]


def _vote(evidence: np.ndarray, chosen: np.ndarray | None = None) -> Label:
    picked = evidence if chosen is None else np.take_along_axis(evidence, chosen, axis=1)
    return np.sign(picked.sum(axis=1)).astype(np.int8)


def top_vote(evidence: Float64[np.ndarray, "pairs rules"], k: int = K) -> Label:
    """The sum over the k largest magnitudes."""
    return _vote(evidence, _smallest(-np.abs(evidence), k))


def random_vote(d: Float64[np.ndarray, "pairs rules"], rng: np.random.Generator, k: int = K) -> Label:
    """The sum over k rules that each pair draws."""
    return _vote(d, _smallest(rng.random(d.shape), k))


def weighted(world: World, d: Float64[np.ndarray, "pairs rules"]) -> Float64[np.ndarray, "pairs rules"]:
    """Evidence w_i d_i by the oracle's weights; where pairs have their own rules, all alike, the best are equal."""
    return d if world.weights is None else d * world.weights


def em_vote(d: Float64[np.ndarray, "pairs rules"], passes: int = 100) -> Label:
    """By d | Z ~ N(a Z, diag sigma^2) with a and sigma fitted to these pairs without labels, from the sum vote on."""
    expected = np.sign(d.sum(axis=1))
    second = (d**2).mean(axis=0)
    for _ in range(passes):
        strength = expected @ d / len(d)
        weights = strength / (second - strength**2)
        expected = np.tanh(d @ weights)
    # Z and -Z fit alike: rules are held to be right more often than wrong.
    return (np.sign(expected) * np.sign(weights.sum())).astype(np.int8)


# What each makes of (world, d, rng).
STRATEGIES: dict[str, Callable[[World, np.ndarray, np.random.Generator], Label]] = {
    "top-5 by |d|": lambda world, d, rng: top_vote(d),
    "random 5": lambda world, d, rng: random_vote(d, rng),
    "all, plain": lambda world, d, rng: _vote(d),
    "top-5 weighted": lambda world, d, rng: top_vote(weighted(world, d)),
    "all, weighted": lambda world, d, rng: _vote(weighted(world, d)),
    "label-free EM": lambda world, d, rng: em_vote(d),
    # Of rules that no shared factor moves.
    "clean rules": lambda world, d, rng: _vote(d[:, (world.loadings == 0).all(axis=0)]),
}


def label_accuracy(
    world: World, strategies: Iterable[str], rng: np.random.Generator, pairs: int
) -> dict[str, tuple[float, float]]:
    """How often each strategy's label is right, and the standard error over parts of 20,000 pairs if there are two."""
    right: dict[str, list[Bool[np.ndarray, " pairs"]]] = {name: [] for name in strategies}
    for start in range(0, pairs, PART):
        preference, d = world.sample(rng, min(PART, pairs - start))
        for name, found in right.items():
            found.append(STRATEGIES[name](world, d, rng) == preference)
    return {name: (float(np.concatenate(found).mean()), _error(found)) for name, found in right.items()}


def _error(parts: list[np.ndarray]) -> float:
    # Labels of one part share what EM fitted to it.
    if len(parts) > 1:
        return float(np.std([part.mean() for part in parts], ddof=1) / math.sqrt(len(parts)))
    return float(parts[0].std() / math.sqrt(len(parts[0])))
