"""The lowerings of tree attention against dense attention, on rows of trees as a judge reads them; JSON.

    python tools/bench_attention.py                                              # on the device that is here
    python tools/bench_attention.py --heads 32 --kv-heads 8 --dim 128 --dtype bfloat16 --gradient

Sides, one run, outputs compared: each lowering that takes the arrays on this device; the reference, whose mask is
dense; and jax.nn.dot_product_attention (cuDNN on a GPU that has it) over the separate sequences that the trees stand
for, one a rule, which is what attention costs without trees. FLOPs are those of the tree's visible (query, key) pairs,
for all; for the separate sequences also of their own, which compares the kernels at equal work.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

SEPARATE = "separate sequences"
TIMED_SECONDS = 0.1  # at least, of each measurement


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 2, "prompt": 512, "branches": 100, "each": 24, "heads": 8, "kv-heads": 4, "dim": 64, "repeats": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--gradient", action="store_true", help="forward and backward")
    parser.add_argument("--skip", action="append", default=[], help="a side that is not measured, several times")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from adaptrm.attention import dispatch
    from adaptrm.prefix_tree import Node, PrefixTree, pack_rows

    rng = np.random.default_rng(0)
    tree = PrefixTree.build(Node([1] * options.prompt, [Node([1] * options.each)] * options.branches))
    packed = pack_rows([tree] * options.rows, [[i] for i in range(options.rows)], len(tree), options.branches)
    shapes = (options.heads, options.kv_heads, options.kv_heads)
    draw = lambda heads: rng.standard_normal((options.rows, len(tree), heads, options.dim))  # noqa: E731
    qkv = [jnp.asarray(draw(heads), options.dtype) for heads in shapes]

    # Where the tokens of each separate sequence stand in its row.
    branch = options.prompt + options.each * np.arange(options.branches)[:, None] + np.arange(options.each)
    index = np.concatenate([np.tile(np.arange(options.prompt), (options.branches, 1)), branch], axis=1)

    once = np.ones(index.shape, np.float32)
    once[1:, : options.prompt] = 0  # of the beginning, which stands in each, one copy counts

    def separate(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if cudnn else None)
        return out * np.tile(once, (options.rows, 1))[..., None, None].astype(out.dtype)

    def to_tree(x):
        """What each separate sequence has of a token, summed."""
        x = x.astype(jnp.float32).reshape(options.rows, -1, *x.shape[2:])
        return jnp.zeros((options.rows, len(tree), *x.shape[2:])).at[:, index.ravel()].add(x)

    def lowering(name):
        attend = import_module(f"adaptrm.attention.{name}").tree_attention
        return lambda q, k, v: attend(q, k, v, packed.subtree_end)

    cudnn = jax.default_backend() == "gpu" and options.dtype == "bfloat16"
    kernel = dispatch.KERNELS.get(dispatch.platform())
    refused = kernel and import_module(f"adaptrm.attention.{kernel}").unsupported(*qkv[:2])
    names = ["reference", dispatch.ANYWHERE, *([kernel] if kernel and not refused else [])]
    sides = {name: lowering(name) for name in names} | {SEPARATE: separate}
    sides = {name: side for name, side in sides.items() if name not in options.skip}

    def program(attend):
        if not options.gradient:
            return jax.jit(attend)
        return jax.jit(jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2)))

    arrays = dict.fromkeys(sides, qkv)
    if SEPARATE in sides:
        arrays[SEPARATE] = [x[:, index].reshape(-1, index.shape[1], *x.shape[2:]) for x in qkv]
    jitted = {name: partial(program(side), *arrays[name]) for name, side in sides.items()}
    found = {name: jax.block_until_ready(run()) for name, run in jitted.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    calls = {}
    for name, run in jitted.items():  # so many in a row that starting them and waiting for them do not count
        start = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = max(1, round(TIMED_SECONDS / (time.perf_counter() - start)))
    for _ in range(options.repeats):
        for name, run in jitted.items():
            start = time.perf_counter()
            jax.block_until_ready([run() for _ in range(calls[name])][-1])
            seconds[name].append((time.perf_counter() - start) / calls[name])
    took = {name: statistics.median(each) for name, each in seconds.items()}

    if SEPARATE in found:
        found[SEPARATE] = jax.tree.map(to_tree, found[SEPARATE])
    first = next(iter(found))
    wide = {name: [np.asarray(x, np.float64) for x in jax.tree.leaves(each)] for name, each in found.items()}
    largest = max(np.abs(x).max() for x in wide[first])
    differences = {
        name: max(float(np.abs(x - y).max()) for x, y in zip(each, wide[first], strict=True)) / largest
        for name, each in wide.items()
    }
    times = 3.5 if options.gradient else 1  # a gradient repeats the first of two products and has four of its own
    pairs = options.rows * int((packed.subtree_end[0] - np.arange(len(tree))).sum())
    flops = times * 4 * options.heads * options.dim * pairs
    own = options.rows * options.branches * index.shape[1] * (index.shape[1] + 1) // 2
    device = jax.devices()[0]
    result = {
        "milliseconds": {name: round(1000 * each, 3) for name, each in took.items()},
        "times_the_fastest": {name: round(each / min(took.values()), 2) for name, each in took.items()},
        "gflops_per_second_of_visible_pairs": {name: round(flops / each / 1e9, 1) for name, each in took.items()},
        "gflops_per_second_of_separate_sequences_own_pairs": (
            round(flops / pairs * own / took[SEPARATE] / 1e9, 1) if SEPARATE in took else None
        ),
        f"relative_difference_from_{first}": differences,
        "visible_pairs": pairs,
        "share_of_pairs_that_is_visible": round(pairs / (options.rows * len(tree) ** 2), 4),
        "share_of_causal_pairs_that_is_visible": round(2 * pairs / (options.rows * len(tree) * (len(tree) + 1)), 4),
        "tokens": options.rows * len(tree),
        "tokens_of_separate_sequences": options.rows * index.size,
        "kernel_not_measured": refused or (None if kernel else f"there is none for {dispatch.platform()}"),
        "separate_sequences_by": "cuDNN" if cudnn else "XLA",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "device": device.device_kind,
        "jax": jax.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if not max(differences.values()) < (1e-4 if options.dtype == "float32" else 3e-2):
        sys.exit("the sides do not agree")


if __name__ == "__main__":
    main()
