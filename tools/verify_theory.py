"""What is true about maximum discrepancy: every figure of METHOD.md section 2 made anew, beside the figure it gives.

Three parts. The statement, proved in numbers for each noise law and k: does the log-likelihood ratio rise on a fine
grid, does any set of k of 8 rules beat the k largest |d| once all magnitudes are known (exact, draw by draw), and by
how much does the best set of ranks beat them in a simulation (chosen on one half of the draws, measured on the other).
The rank sets' accuracies, and those of every strategy in every world. bits is the mutual information of label and
hidden preference. Exits with 1 where a figure differs from METHOD.md's by more than .015, or a verdict from the
statement's. About two minutes on two cores.

    python tools/verify_theory.py --plot theory.png
    python tools/verify_theory.py --json > theory.json
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np

from adaptrm.selection import theory
from adaptrm.selection.theory import NOISES, WORLDS

WITHIN = 0.015
STRENGTH, FEW = 0.3, 8  # of the rank sets
KS = (1, 3, 5)
METHOD_DRAWS, METHOD_PAIRS = 100_000, 20_000
RANK_GAPS = ("largest_difference_in", "method_top_in_its", "method_best_in_its")
NEAR = 0.002
# Standard errors beyond which the largest of some tens of differences is no chance.
SURE = 4.5

# METHOD.md section 2: accuracy of the top set and of the best rank set, for each k.
RANK_SETS = {
    "Gaussian": [(0.747, 0.747), (0.784, 0.784), (0.796, 0.796)],
    "Laplace": [(0.699, 0.702), (0.760, 0.771), (0.792, 0.800)],
    "uniform": [(0.891, 0.891), (0.808, 0.889), (0.798, 0.844)],
    "Student t3": [(0.727, 0.749), (0.792, 0.819), (0.823, 0.840)],
}
TABLE = ("top-5 by |d|", "random 5", "all, plain", "top-5 weighted", "all, weighted")
WORLD_FIGURES = {
    "alike": dict(zip(TABLE, (0.788, 0.633, 0.931, 0.788, 0.931), strict=True)),
    "sparse 8": dict(zip(TABLE, (0.996, 0.634, 0.984, 0.996, 0.984), strict=True)),
    "sparse 3": dict(zip(TABLE, (0.761, 0.550, 0.730, 0.760, 0.730), strict=True)),
    "noisy 20": dict(zip(TABLE, (0.649, 0.718, 0.980, 0.994, 1.000), strict=True)),
    "junk 20": dict(zip(TABLE, (0.498, 0.700, 0.952, 0.995, 1.000), strict=True)),
    "correlated": dict(zip(TABLE, (0.667, 0.619, 0.704, 0.667, 0.704), strict=True)),
    "opposed 10": dict(zip(TABLE, (0.781, 0.664, 0.972, 0.994, 1.000), strict=True)),
    "heavy tails": dict(zip(TABLE, (0.657, 0.658, 0.939, 0.657, 0.939), strict=True)),
    "nuisance on half": {
        "label-free EM": 0.585,
        "all, plain": 0.748,
        "top-5 by |d|": 0.725,
        "clean rules": 0.856,
        "all, weighted": 0.877,
    },
    "nuisance on all": {"label-free EM": 0.537, "all, plain": 0.537, "top-5 by |d|": None},
    # Not in METHOD.md's tables.
    "saturating": dict.fromkeys(TABLE),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"pairs": 200_000, "draws": 1_000_000, "exact-draws": 5_000, "seed": 0}
    helps = ("of each world", "of each noise law and k", "on which all sets are compared exactly", "of everything")
    for (name, value), text in zip(sizes.items(), helps, strict=True):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text}; default {value}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figures; needs matplotlib")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.plot is not None:
        import_pyplot()  # a missing package is said before the minutes of work
    statement = [
        prove(noise, k, generator(options.seed, noise, k), options.draws, options.exact_draws)
        for noise in NOISES
        for k in KS
    ]
    ranks = [check_ranks(noise, generator(options.seed, noise), options.draws) for noise in NOISES]
    cells = [one for proof in statement for one in rank_cells(proof, options.draws)]
    for world, figures in WORLD_FIGURES.items():
        cells += world_cells(world, figures, generator(options.seed, world), options.pairs)
    wrong = [f"{one['where']}, {one['what']}" for one in cells if not one["agrees"]]
    wrong += [f"{proof['noise']}, k = {proof['k']}: {what}" for proof in statement for what in proof["not_as_stated"]]
    wrong += [f"{rank['noise']}: ranks by quadrature" for rank in ranks if not rank["agrees"]]
    found = {"statement": statement, "ranks": ranks, "cells": cells, "within": WITHIN, "disagree": wrong}
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    if options.plot is not None:
        draw(found, options.plot)
    if wrong:
        sys.exit(f"verify_theory: these do not agree: {'; '.join(wrong)}")


def generator(seed: int, *name) -> np.random.Generator:
    """Of its own for each figure, so that one can be made without the others."""
    return np.random.default_rng([seed, zlib.crc32(repr(name).encode())])


def prove(noise: str, k: int, rng: np.random.Generator, draws: int, exact_draws: int) -> dict:
    """Is it best to select the k largest |d|? So it is stated of monotone laws at k = 1, of linear ones at every k."""
    law = NOISES[noise]
    simulated = theory.simulate_rank_sets(law, k, rng, draws, FEW, STRENGTH)
    magnitudes = -np.sort(-np.abs(STRENGTH + law.sample(rng, (exact_draws, FEW))), axis=1)
    exact = theory.accuracy_given_magnitudes(magnitudes, simulated.sets, law, STRENGTH)
    more = exact.max(axis=1) - exact[:, 0]
    gains = exact[:, simulated.best] - exact[:, 0]
    gain, gain_error = gains.mean(), gains.std(ddof=1) / np.sqrt(exact_draws)
    rises, linear = shape_of(law)
    never_beaten = bool((more < 1e-9).all())
    stated = law.linear or (law.monotone and k == 1)
    holds = {
        "log-likelihood ratio": (rises, linear) == (law.monotone, law.linear),
        "optimality": never_beaten == stated,
        # Where the k largest are not best, one fixed set of ranks shows it beyond chance.
        "gain": stated or gain > SURE * gain_error,
        "simulation": abs(simulated.gain - gain) <= SURE * np.hypot(simulated.gain_error, gain_error),
    }
    return {
        "noise": noise,
        "k": k,
        "log_ratio_never_falls": rises,
        "log_ratio_is_linear": linear,
        "stated_optimal": stated,
        "optimal": never_beaten,
        "draws_where_another_set_is_better": float((more >= 1e-9).mean()),
        "most_it_is_better_by": float(more.max()),
        "best_selection_by_magnitudes": float(exact.max(axis=1).mean()),
        "top": float(simulated.accuracy[0]),
        "top_error": float(error_of(simulated.accuracy[0], draws)),
        "best": float(simulated.best_accuracy),
        "best_error": float(error_of(simulated.best_accuracy, draws // 2)),
        "best_ranks": [int(rank) + 1 for rank in simulated.sets[simulated.best]],
        "gain": float(gain),
        "gain_error": float(gain_error),
        "simulated_gain": float(simulated.gain),
        "simulated_gain_error": float(simulated.gain_error),
        "not_as_stated": [name for name, right in holds.items() if not right],
    }


def shape_of(law: theory.Noise) -> tuple[bool, bool]:
    """Whether l(d) never falls, and whether it is a line, on a fine grid of d from 0 to the law's edge or 20."""
    d = np.linspace(0, min(law.edge + STRENGTH - 1e-6, 20), 20_001)
    steps = np.diff(np.minimum(theory.log_ratio(law, d, STRENGTH), 1e3))  # l is infinite where -a cannot give d
    return bool((steps > -1e-9).all()), bool(np.ptp(steps) < 1e-9)


def check_ranks(noise: str, rng: np.random.Generator, draws: int) -> dict:
    """One rule by its rank of |d|: quadrature against simulation."""
    exact = theory.rank_accuracy(NOISES[noise], STRENGTH, FEW)
    simulated = theory.simulate_rank_sets(NOISES[noise], 1, rng, draws, FEW, STRENGTH).accuracy
    sigmas = np.abs(simulated - exact) / error_of(exact, draws)
    top, best = RANK_SETS[noise][KS.index(1)]
    return {
        "noise": noise,
        "accuracy": exact.tolist(),
        "bits": theory.information(exact).tolist(),
        "simulated": simulated.tolist(),
        "largest_difference_in_standard_errors": float(sigmas.max()),
        "method_top_in_its_standard_errors": float((top - exact[0]) / error_of(exact[0], METHOD_DRAWS)),
        "method_best_in_its_standard_errors": float((best - exact.max()) / error_of(exact.max(), METHOD_DRAWS)),
        "agrees": bool(sigmas.max() < SURE),
    }


def rank_cells(proof: dict, draws: int) -> list[dict]:
    where = f"{proof['noise']}, k = {proof['k']}"
    top, best = RANK_SETS[proof["noise"]][KS.index(proof["k"])]
    ranks = " ".join(map(str, proof["best_ranks"]))
    exact_top = exact_best = None
    if proof["k"] == 1:
        exact = theory.rank_accuracy(NOISES[proof["noise"]], STRENGTH, FEW)
        exact_top, exact_best = exact[0], exact[proof["best_ranks"][0] - 1]
    return [
        cell(where, "the largest", proof["top"], proof["top_error"], exact_top, draws, top, METHOD_DRAWS),
        cell(
            where,
            f"best: ranks {ranks}",
            proof["best"],
            proof["best_error"],
            exact_best,
            draws // 2,
            best,
            METHOD_DRAWS,
        ),
    ]


def world_cells(name: str, figures: dict, rng: np.random.Generator, pairs: int) -> list[dict]:
    found = theory.label_accuracy(WORLDS[name], figures, rng, pairs)
    return [
        cell(name, what, *found[what], exact_vote(name, what), pairs, figures[what], METHOD_PAIRS) for what in figures
    ]


def exact_vote(name: str, strategy: str) -> float | None:
    """The accuracy of votes of all rules, where there is a formula."""
    world = WORLDS[name]
    if not world.noise.linear or world.base is not None:
        return None
    equal = np.ones(theory.RULES)
    if strategy == "all, plain":
        return theory.linear_accuracy(world, equal)
    if strategy == "all, weighted":
        return theory.linear_accuracy(world, equal if world.weights is None else world.weights)
    if strategy == "clean rules":
        return theory.linear_accuracy(world, (world.loadings == 0).all(axis=0).astype(float))
    return None


def cell(
    where: str, what: str, ours: float, error: float, exact: float | None, trials: int, method: float | None, its: int
) -> dict:
    """One figure: ours of so many trials, the exact one if there is, and METHOD.md's, of ``its`` trials."""
    figures = {"ours": float(ours), "error": float(error), "exact": None if exact is None else float(exact)}
    as_exact = exact is None or bool(abs(ours - exact) <= SURE * error_of(exact, trials) + 1 / trials)
    apart = None
    if method is not None:  # it is rounded to .001
        apart = float(max(abs(ours - method) - 5e-4, 0) / np.hypot(error, error_of(ours, its) + 1 / its))
    return (
        {"where": where, "what": what}
        | figures
        | {
            "method": method,
            "bits": float(theory.information(ours)),
            "standard_errors_from_method": apart,
            "agrees": as_exact and (method is None or bool(abs(ours - method) <= WITHIN)),
        }
    )


def error_of(accuracy: float | np.ndarray, draws: int) -> np.ndarray:
    return np.sqrt(accuracy * (1 - accuracy) / draws)


def as_text(found: dict) -> str:
    lines = [
        "Is it best to select the k largest |d|, of all selections that look at magnitudes alone?",
        "Share of draws, and what the best set of ranks gains: exact given the magnitudes, and in the simulation.",
        "",
    ]
    lines += [sentence(proof) for proof in found["statement"]]
    lines += ["", "One rule by its rank of |d|, the largest first, by quadrature (in brackets its bits about Z):", ""]
    for rank in found["ranks"]:
        each = "  ".join(f"{p:.4f} ({bits:.3f})" for p, bits in zip(rank["accuracy"], rank["bits"], strict=True))
        apart, top, best = (rank[f"{name}_standard_errors"] for name in RANK_GAPS)
        lines.append(f"{rank['noise']:<11} {each}")
        alike = sum(abs(rank["accuracy"][0] - p) < NEAR for p in rank["accuracy"])
        if alike > 1:
            lines.append(
                f"{'':<11} the first {alike} ranks are alike to {NEAR}: which is best in a simulation is chance"
            )
        lines.append(f"{'':<11} standard errors from it: simulation {apart:.1f}, METHOD.md {top:+.1f} and {best:+.1f}")
    columns = f"{'ours':>7} {'error':>7} {'exact':>7} {'METHOD':>7} {'bits':>6}"
    lines += ["", f"{'':<22} {'':<28} {columns}  within {found['within']}"]
    before = None
    for one in found["cells"]:
        shown = [f"{one['ours']:7.4f}", f"{one['error']:7.4f}"]
        shown += [f"{'-':>7}" if one[name] is None else f"{one[name]:7.4f}" for name in ("exact", "method")]
        verdict = "-" if one["method"] is None else "yes" if one["agrees"] else "NO"
        where = "" if one["where"] == before else one["where"]
        lines.append(f"{where:<22} {one['what']:<28} {' '.join(shown)} {one['bits']:6.3f}  {verdict}")
        before = one["where"]
    compared = [one for one in found["cells"] if one["method"] is not None]
    agree = sum(one["agrees"] for one in compared)
    most = max(compared, key=lambda one: one["standard_errors_from_method"])
    lines += [
        "",
        f"{agree} of METHOD.md's {len(compared)} figures agree within {found['within']}; the furthest is "
        f"{most['where']}, {most['what']}, by {most['standard_errors_from_method']:.1f} standard errors.",
    ]
    return "\n".join(lines)


def sentence(proof: dict) -> str:
    """The verdict of one noise law and k, with its proof."""
    start = f"{proof['noise'] + ', k = ' + str(proof['k']):<18}"
    ranks = " ".join(map(str, proof["best_ranks"]))
    gains = ", ".join(f"{proof[name]:+.4f} +- {proof[name + '_error']:.4f}" for name in ("gain", "simulated_gain"))
    share = proof["draws_where_another_set_is_better"]
    verdict = "optimal: no set is ever better;" if proof["optimal"] else f"fails: another set is better on {share:.0%};"
    return f"{start} {verdict} ranks {ranks} gain {gains}"


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit("verify_theory: --plot needs matplotlib: pip install 'adaptrm[plots]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(found: dict, path: Path) -> None:
    """The ratios, the rank sets and the worlds, METHOD.md's figures as crosses."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(19, 6), width_ratios=(1, 1.2, 2.2), layout="constrained")
    d = np.linspace(0, 5, 2001)
    for noise, law in NOISES.items():
        ratio = theory.log_ratio(law, d, STRENGTH)
        axes[0].plot(d, np.where(np.isfinite(ratio), ratio, np.nan), label=noise)
    edge = NOISES["uniform"].edge
    axes[0].axvline(edge - STRENGTH, color="C2", linestyle=":", label="uniform: infinite from here")
    axes[0].set(xlabel="|d|", ylabel="log-likelihood ratio l", title=f"Does l rise? a = {STRENGTH}, unit noise")
    axes[0].legend()
    cells = [one for one in found["cells"] if one["where"].partition(",")[0] in NOISES]
    bars(axes[1], cells, lambda one: "the k largest |d|" if one["what"] == "the largest" else "best set of ranks")
    axes[1].set(title=f"{FEW} rules, every set of k ranks", ylim=(0.65, 0.94))
    bars(axes[2], [one for one in found["cells"] if one["where"] in WORLDS], lambda one: one["what"])
    axes[2].set(title=f"{theory.RULES} rules, k = {theory.K}", ylim=(0.48, 1.1))
    for one in axes[1:]:
        one.set_ylabel("labels right")
        one.legend(fontsize="small", ncols=4, loc="upper center")
    figure.savefig(path, dpi=120)


def bars(axis, cells: list[dict], series_of) -> None:
    """A group of bars a place, a colour a series."""
    places, series = (list(dict.fromkeys(map(key, cells))) for key in (lambda one: one["where"], series_of))
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        own = [one for one in cells if series_of(one) == name]
        at = [places.index(one["where"]) + (number - (len(series) - 1) / 2) * width for one in own]
        axis.bar(at, [one["ours"] for one in own], width, label=name, yerr=[one["error"] for one in own])
        told = [(x, one["method"]) for x, one in zip(at, own, strict=True) if one["method"] is not None]
        axis.plot(*zip(*told, strict=True), "kx", markersize=4, label="METHOD.md" if not number else None)
    axis.set_xticks(range(len(places)), places, rotation=40, ha="right")


if __name__ == "__main__":
    main()
