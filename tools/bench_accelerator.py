"""The judge in the shape of a large model, on the accelerator that is here, with random weights; JSON.

    python tools/bench_accelerator.py --tokenizer FOLDER --pairs PAIRS --pairs MORE --limit 25

Real pairs, a real tokenizer and chat template, all rules of a pool, bfloat16. Sides, taken in turn in one run:
- judge: pairs to scores as `adaptrm score` makes them, the host asking one part ahead of the device;
- select: pairs to rules and labels, in the program that scores;
- device: the judge's packed questions, already asked;
- xla: these again by the attention that runs anywhere, whose answers are compared with the kernel's;
- dense: the same decoder over separate causal sequences of the trees' mean depth, a row's tokens at a time, with
  cuDNN's attention on a GPU: what the same FLOPs cost without trees;
- product: one large matrix product, which is as fast as this device gets.

MFU is model FLOPs (parameters and visible pairs, without what the last layer leaves out) over the maker's peak.
It needs jax, flax and transformers alone, so that it runs where the rest is not installed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

PRODUCT = 8192  # rows and columns


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a chat template")
    parser.add_argument("--pairs", action="append", required=True, help="a file of pairs, several times")
    parser.add_argument("--shape", default="meta-llama/Llama-3.1-8B-Instruct", help="of adaptrm/models/known.py")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, to try this tool")
    parser.add_argument("--limit", type=int, default=25, help="pairs of each file, spread over it")
    parser.add_argument("--pool", default="safety-100", help="the rules")
    parser.add_argument("--part-size", type=int, default=25, help="pairs asked and answered at a time")
    parser.add_argument("--repeats", type=int, default=3, help="of each side, taken in turn; their median counts")
    parser.add_argument("--skip", action="append", default=[], help="a side that is not measured, several times")
    parser.add_argument("--profile", type=Path, help="a folder: one more run of the device's side, traced")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import adaptrm
    from adaptrm.attention import dispatch
    from adaptrm.data.chat import ChatTokenizer
    from adaptrm.hf.load import abstract_model, random_model
    from adaptrm.judge.program import answer_leaves
    from adaptrm.models import CausalLM, layers
    from adaptrm.models.known import KNOWN
    from adaptrm.parallel import local_mesh
    from adaptrm.parallel.rows import over_rows
    from adaptrm.train.state import param_shardings
    from adaptrm.train.throughput import multiplied_parameters, peak_flops, training_flops

    config = KNOWN[options.shape]
    config = replace(config, num_hidden_layers=options.layers or config.num_hidden_layers)
    mesh = local_mesh()
    definition, abstract = abstract_model(CausalLM, config)

    @partial(jax.jit, out_shardings=param_shardings(definition, abstract, mesh))
    def draw():
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(random_model(CausalLM, config, 0)))

    pairs = []
    for file in options.pairs:
        found = adaptrm.load_pairs(file)
        pairs += found[:: max(1, len(found) // options.limit)][: options.limit]
    parts = [pairs[start : start + options.part_size] for start in range(0, len(pairs), options.part_size)]
    chat, pool = ChatTokenizer.from_folder(options.tokenizer), adaptrm.RulePool.load(options.pool)
    judge = adaptrm.Judge(options.tokenizer, definition, draw(), chat, pool, "conversation-first", "bfloat16", mesh)

    start = time.perf_counter()
    asked = [judge.ask(part) for part in parts]
    host = time.perf_counter() - start
    trees = [questions.tree for part in asked for _, questions in part.questions]
    rows = [part.packed.tokens.shape for part in asked]

    def judge_side():
        with ThreadPoolExecutor(1) as thread:  # as adaptrm.judge.score does
            coming, scores = thread.submit(judge.ask, parts[0]), []
            for following in [*parts[1:], None]:
                ready, coming = coming.result(), following and thread.submit(judge.ask, following)
                scores.append(judge.answer(ready))
        return scores

    def select_side():
        return [judge.select(part) for part in parts]

    def device_side():
        return [judge._answers(part) for part in asked]

    def xla_side():
        os.environ[dispatch.FORCE] = dispatch.ANYWHERE
        try:  # a new function, so that it is traced anew
            step = jax.jit(lambda *arguments: answer_leaves.__wrapped__(*arguments), static_argnums=(0, 1, 2))
            program = partial(step, *judge.program.args)
            return [part.packed.to_owners(over_rows(part.packed.arrays, mesh, program)) for part in asked]
        finally:
            del os.environ[dispatch.FORCE]

    depths = [int(tree.positions[leaf]) + 1 for tree in trees for leaf in tree.leaves]
    depth = round(statistics.mean(depths))
    batch = max(1, round(max(length for _, length in rows) / depth))
    flat = np.random.default_rng(0).integers(0, config.vocab_size, (batch, depth)).astype(np.int32)
    positions = np.tile(np.arange(depth, dtype=np.int32), (batch, 1))
    gpu = jax.default_backend() == "gpu"

    def causal(q, k, v, subtree_end):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if gpu else None)

    @jax.jit
    def dense(state, *arrays):
        return nnx.merge(definition, state).model(*arrays, dtype=jnp.bfloat16)[:, -1]

    steps = max(1, round(sum(map(len, trees)) / flat.size))

    def dense_side():
        layers.tree_attention, ours = causal, layers.tree_attention
        try:
            with jax.set_mesh(mesh):
                for _ in range(steps):
                    out = dense(judge._state, flat, positions, np.full_like(flat, depth))
                return jax.block_until_ready(out)
        finally:
            layers.tree_attention = ours

    square = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT), jnp.bfloat16)
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, y: (x @ y) / PRODUCT**0.5, x))

    def product_side():
        return jax.block_until_ready(multiply(square))

    sides: dict[str, Callable] = {"judge": judge_side, "select": select_side, "device": device_side}
    sides |= {"xla": xla_side, "dense": dense_side, "product": product_side}
    sides = {name: side for name, side in sides.items() if name not in options.skip}
    found, seconds = {}, {name: [] for name in sides}
    for name, side in sides.items():
        start = time.perf_counter()
        found[name] = side()
        print(f"{name}: {time.perf_counter() - start:.1f} s, compilation included", file=sys.stderr)
    for _ in range(options.repeats):
        for name, side in sides.items():
            if name == "xla":
                continue  # it would be compiled anew; its answers are what counts
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(each) for name, each in seconds.items() if each}
    if options.profile is not None:
        with jax.profiler.trace(str(options.profile)):
            device_side()

    parameters = multiplied_parameters(judge._state)
    forward = lambda tokens, visible: training_flops(config, parameters, tokens, visible) / 3  # noqa: E731
    total = sum(map(len, trees))
    visible = sum(int((tree.subtree_end - np.arange(len(tree))).sum()) for tree in trees)
    # The last layer takes keys and values of all tokens and the rest of the leaves, whose pairs are their depths.
    keys = 2 * config.num_key_value_heads * config.head_dim * config.hidden_size
    left_out = forward(total, visible) - forward(len(depths), sum(depths))
    left_out = left_out // config.num_hidden_layers - 2 * keys * (total - len(depths))
    head = 2 * config.vocab_size * config.hidden_size * len(depths)
    flops = dict.fromkeys(("judge", "select", "device"), forward(total, visible) - left_out + head)
    flops["dense"] = steps * forward(flat.size, batch * depth * (depth + 1) // 2)
    flops["product"] = 10 * 2 * PRODUCT**3
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    differences = {}
    if {"device", "xla"} <= set(found):
        ours = [part.packed.to_owners(over_rows(part.packed.arrays, mesh, judge.program)) for part in asked]
        off = [np.abs(x[i] - y[i]) for x, y in zip(ours, found["xla"], strict=True) for i in x]
        flat_off = np.concatenate([x.ravel() for x in off])
        differences = {"max": float(flat_off.max()), "median": float(np.median(flat_off))}
    same = None
    if {"judge", "select"} <= set(found):
        apart = [adaptrm.select(scores.a, scores.b, scores.relevance) for scores in found["judge"]]
        same = float(np.mean(np.concatenate([x.rules == y.rules for x, y in zip(apart, found["select"], strict=True)])))
    result = {
        "pairs": len(pairs),
        "pairs_per_second": {n: round(len(pairs) / took[n], 3) for n in ("judge", "select", "device") if n in took},
        "tokens_per_second": {n: round(total / took[n]) for n in ("judge", "select", "device") if n in took},
        "tflops_per_second": {name: round(flops[name] / each / 1e12, 1) for name, each in took.items()},
        "mfu": peak and {name: round(flops[name] / each / (peak * mesh.size), 4) for name, each in took.items()},
        "seconds_of_the_host_alone": round(host, 3),
        "tokens": total,
        "tokens_one_sequence_a_rule": sum(depths),
        "padding": round(1 - total / sum(count * length for count, length in rows), 4),
        "rows": rows,
        "mean_depth": depth,
        "difference_of_log_probabilities_from_xla": differences,
        "selected_rules_equal_to_those_of_the_scores": same,
        "all_seconds": {name: [round(x, 3) for x in each] for name, each in seconds.items()},
        "parameters_multiplied": parameters,
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "device": device.device_kind,
        "devices": mesh.size,
        "peak_tflops_of_a_device": peak and peak / 1e12,
        "jax": jax.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
