"""All rules of a conversation in one prefix tree, against what one would do with transformers; JSON.

    python tools/bench_judge.py                                                       # random weights, made-up lengths
    python tools/bench_judge.py --model MODEL --pairs PAIRS --pairs MORE --limit 25   # a real judge, real pairs

Four sides, with the same weights in float32, one run, answers compared:
- tree: the judge of adaptrm, on a device a core;
- loop: one full sequence a rule through transformers, as published: the logits of all positions, of which the last
  counts; and "loop, last logits", which asks for those of the last position alone;
- cache: transformers again, the beginning once, its key-value cache repeated for all rules;
- dense: the same decoder, jitted, over separate sequences of the trees' mean depth and as many tokens: attention with a
  dense mask (reference), and with the blockwise attention of the tree (blockwise). FLOPs are those of the parameters
  and of the visible pairs, so the ratio says what the tree costs; what the last layer leaves out is not counted.

All but the tree are measured on a sample where there is much to do; their time for all is by their tokens.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# torch's waiting threads would otherwise spin on the cores that the other side, or anything else, computes on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a judge's folder; without it one with random weights is made")
    parser.add_argument("--pairs", action="append", default=[], help="with --model: a file of pairs, several times")
    parser.add_argument("--limit", type=int, default=25, help="pairs of each file, spread over it")
    parser.add_argument("--pool", default="safety-100", help="with --model: the rules")
    sizes = {
        "layers": 8,
        "hidden": 512,
        "heads": 8,
        "kv-heads": 4,
        "intermediate": 1408,
        "vocab": 8000,
        "conversations": 4,
        "prompt": 512,
        "rules": 100,
        "rule-tokens": 24,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"without --model, default {value}")
    parser.add_argument("--devices", type=int, default=CORES, help="that the tree is computed on; default: a core each")
    parser.add_argument("--repeats", type=int, default=3, help="of each side, taken in turn; their median counts")
    parser.add_argument("--loop-sample", type=int, default=50, help="sequences that the loops are measured on")
    parser.add_argument("--cache-sample", type=int, default=4, help="trees that the cache is measured on")
    parser.add_argument("--dense-tokens", type=int, default=20_000, help="at most, that the dense side is measured on")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def made_up(options: argparse.Namespace, folder: Path):
    """Trees of random tokens, each with one run of leaves, and the answers' token ids; the model is written."""
    import numpy as np
    import torch
    import transformers

    from adaptrm.prefix_tree import Node, PrefixTree

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.prompt + options.rule_tokens,
        initializer_range=options.hidden**-0.5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(0, options.vocab, size).tolist()  # noqa: E731
    rules = [Node(draw(options.rule_tokens)) for _ in range(options.rules)]
    trees = [(PrefixTree.build(Node(draw(options.prompt), rules)), 1) for _ in range(options.conversations)]
    return trees, tuple(tuple(ids) for ids in rng.choice(options.vocab, (3, 2), replace=False).tolist())


def real(options: argparse.Namespace):
    """Trees of real pairs, with the number of their runs of leaves, and the answers' token ids."""
    import adaptrm
    from adaptrm.data.chat import ChatTokenizer
    from adaptrm.judge.prompts import JudgePrompt

    prompt = JudgePrompt(ChatTokenizer.from_folder(Path(options.model)), adaptrm.RulePool.load(options.pool))
    trees = []
    for file in options.pairs:
        pairs = adaptrm.load_pairs(file)
        for pair in pairs[:: max(1, len(pairs) // options.limit)][: options.limit]:
            every = range(len(prompt.pool))
            (asked,) = prompt.pair_trees(pair.prompt, pair.response_a, pair.response_b, every)
            trees.append((asked.tree, len(asked.sides)))
    return trees, prompt.answers


def spread(items: list, count: int) -> list:
    return items[:: max(1, len(items) // count)][:count]


def answers_of(logits, answers):
    import torch

    log_p = torch.log_softmax(logits.float(), -1)
    return torch.stack([torch.logsumexp(log_p[..., list(ids)], -1) for ids in answers], -1)


def loop_side(model, sample, answers, **asked_for) -> Callable:
    """One whole sequence at a time; the sample is of (tree, leaf)."""
    import torch

    sequences = [torch.from_numpy(tree.sequence(leaf)).long()[None] for tree, leaf in sample]

    def run():
        with torch.no_grad():
            return [answers_of(model(ids, use_cache=False, **asked_for).logits[:, -1], answers) for ids in sequences]

    return run


def cache_side(model, trees, answers) -> Callable:
    """The beginning of each run of leaves once, then its rules as one batch behind the repeated cache."""
    import torch
    import transformers

    from adaptrm.prefix_tree import common_prefix

    runs = []
    for tree, count in trees:
        each = len(tree.leaves) // count
        for run in range(count):
            whole = [tree.sequence(leaf) for leaf in range(run * each, (run + 1) * each)]
            cut = common_prefix(whole)
            lengths = torch.tensor([len(ids) - cut for ids in whole])
            rules = torch.zeros(each, int(lengths.max()), dtype=torch.long)
            for row, ids in enumerate(whole):
                rules[row, : len(ids) - cut] = torch.from_numpy(ids[cut:]).long()
            mask = torch.arange(rules.shape[1]) < lengths[:, None]
            mask = torch.cat([torch.ones(each, cut, dtype=torch.long), mask.long()], 1)
            runs.append((torch.from_numpy(whole[0][:cut]).long()[None], rules, mask, lengths))

    def run():
        found = []
        with torch.no_grad():
            for beginning, rules, mask, lengths in runs:
                cache = transformers.DynamicCache(config=model.config)
                model.model(beginning, past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(len(rules))
                hidden = model.model(
                    rules, past_key_values=cache, attention_mask=mask, use_cache=True
                ).last_hidden_state
                last = hidden[torch.arange(len(rules)), lengths - 1]
                found.append(answers_of(model.lm_head(last), answers))
        counts = iter(found)
        return [torch.cat([next(counts) for _ in range(count)]) for _, count in trees]

    return run


def main() -> None:
    options = parse_arguments()
    import jax

    jax.config.update("jax_num_cpu_devices", options.devices)
    import numpy as np
    import torch
    import transformers
    from flax import nnx

    from adaptrm.attention import dispatch
    from adaptrm.hf import load_weights, open_folder
    from adaptrm.judge.program import answer_leaves
    from adaptrm.models import CausalLM
    from adaptrm.parallel import local_mesh
    from adaptrm.parallel.rows import over_rows, pack_trees, rows_at_once
    from adaptrm.train.throughput import multiplied_parameters, training_flops

    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or temporary
        trees, answers = real(options) if options.model else made_up(options, Path(folder))
        mesh = local_mesh()
        definition, state, config = load_weights(open_folder(folder), CausalLM, mesh, dtype="float32")
        torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tree_side():
        packed = pack_trees([tree for tree, _ in trees], mesh)
        found = packed.to_owners(over_rows(packed.arrays, mesh, program))
        return [found[index] for index in range(len(trees))]

    program = lambda *arrays: answer_leaves(definition, answers, "float32", state, *arrays)  # noqa: E731
    some_rows = [x[: rows_at_once(mesh)] for x in pack_trees([tree for tree, _ in trees], mesh).arrays]

    depths = [int(tree.positions[leaf]) + 1 for tree, _ in trees for leaf in tree.leaves]
    total = sum(len(tree) for tree, _ in trees)
    depth, at_once = round(statistics.mean(depths)), rows_at_once(mesh)
    batches = max(1, round(min(total, options.dense_tokens) / depth / at_once))
    row = np.arange(depth, dtype=np.int32)[None]
    flat = np.random.default_rng(1).integers(0, config.vocab_size, (batches * at_once, depth)).astype(np.int32)
    flat = flat, np.repeat(row, len(flat), 0), np.full_like(flat, depth)

    def dense_side(lowering: str) -> Callable:
        @jax.jit
        def forward(state, *arrays):
            return nnx.merge(definition, state).model(*arrays)[:, -1]

        def run():
            os.environ[dispatch.FORCE] = lowering
            try:
                return over_rows(flat, mesh, lambda *arrays: forward(state, *arrays))
            finally:
                del os.environ[dispatch.FORCE]

        return run

    leaves = [(tree, leaf) for tree, _ in trees for leaf in range(len(tree.leaves))]
    of_loop, of_cache = spread(leaves, options.loop_sample), spread(trees, options.cache_sample)
    every_leaf = [(tree, leaf) for tree, _ in of_cache for leaf in range(len(tree.leaves))]
    samples = {"loop": of_loop, "loop, last logits": of_loop, "cache": every_leaf}
    sides = {
        "tree": tree_side,
        "dense reference": dense_side("reference"),
        "dense blockwise": dense_side("xla"),
        "cache": cache_side(torch_model, of_cache, answers),
        "loop": loop_side(torch_model, of_loop, answers),
        "loop, last logits": loop_side(torch_model, of_loop, answers, logits_to_keep=1),
    }
    found, seconds = {}, {name: [] for name in sides}
    for name, run in sides.items():  # compiles, and is not timed; of a tree's many rows the first are enough
        run() if name != "tree" else over_rows(some_rows, mesh, program)
    for _ in range(options.repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(each) for name, each in seconds.items()}

    place = {id(tree): index for index, (tree, _) in enumerate(trees)}
    found["cache"] = torch.cat(found["cache"])
    differences = {}
    for name, sample in samples.items():
        ours = np.stack([found["tree"][place[id(tree)]][leaf] for tree, leaf in sample])
        theirs = np.concatenate([np.asarray(x).reshape(-1, 3) for x in found[name]])
        differences[name] = float(np.abs(ours - theirs).max())
    differences["dense"] = float(np.abs(found["dense reference"] - found["dense blockwise"]).max())
    separate = lambda some: sum(int(tree.positions[tree.leaves[leaf]]) + 1 for tree, leaf in some)  # noqa: E731
    parameters = multiplied_parameters(state)
    flops = lambda tokens, pairs: training_flops(config, parameters, tokens, pairs) / 3  # noqa: E731
    visible = sum(int((tree.subtree_end - np.arange(len(tree))).sum()) for tree, _ in trees)
    computed = pack_trees([tree for tree, _ in trees], mesh).tokens.size
    # The last layer takes keys and values of all tokens and the rest of the leaves, whose pairs are their depths.
    keys = 2 * config.num_key_value_heads * config.head_dim * config.hidden_size
    left_out = flops(total, visible) - flops(len(leaves), sum(depths))
    left_out = left_out // config.num_hidden_layers - 2 * keys * (total - len(leaves))
    rate = {"tree": (flops(total, visible) - left_out) / took["tree"]}
    for name in ("dense reference", "dense blockwise"):
        rate[name] = flops(flat[0].size, len(flat[0]) * depth * (depth + 1) // 2) / took[name]
    for name, sample in samples.items():
        took[name] *= separate(leaves) / separate(sample)
    result = {
        "seconds": {name: round(took[name], 3) for name in ("tree", *samples)},
        "trees_per_second": {name: round(len(trees) / took[name], 4) for name in ("tree", *samples)},
        "over_tree": {name: round(took[name] / took["tree"], 2) for name in samples},
        "gflops_per_second": {name: round(x / 1e9, 1) for name, x in rate.items()},
        "tree_over_dense_reference": round(rate["tree"] / rate["dense reference"], 3),
        "tree_over_dense_blockwise": round(rate["tree"] / rate["dense blockwise"], 3),
        "trees": len(trees),
        "sequences_measured": {name: len(sample) for name, sample in samples.items()},
        "tokens": total,
        "tokens_one_sequence_a_rule": separate(leaves),
        "padding": round(1 - total / computed, 4),
        "mean_depth": depth,
        "max_difference_of_log_probabilities": {name: differences[name] for name in samples},
        "max_difference_of_dense_hidden_states": differences["dense"],
        "all_seconds": {name: [round(x, 3) for x in each] for name, each in seconds.items()},
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"cores": CORES, "processor": platform.machine(), "python": platform.python_version()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if not max(differences[name] for name in samples) < 1e-3:
        sys.exit("the sides do not agree")


if __name__ == "__main__":
    main()
