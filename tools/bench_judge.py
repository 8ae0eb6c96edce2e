"""One conversation, many rules: the prefix tree against the published loop, one full sequence a rule.

Both sides run the same random Llama in float32 in one process on the same cores: ours is the jitted program that
``adaptrm.judge.Judge`` runs, on one tree of the conversation with the rules below it; the loop is transformers
(torch) on the conversation followed by each rule in turn. The log-probabilities of three answers are compared.
A first run of each side, with compilation, is left out; times are medians in seconds, of the clock and of the
processor (the second says more where other work shares the cores). Prints JSON.

    python tools/bench_judge.py --out bench.json
    python tools/bench_judge.py --rules 24 --prompt 256 --repeats 5
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "layers": 8,
        "hidden": 512,
        "heads": 8,
        "kv-heads": 4,
        "intermediate": 1408,
        "vocab": 8000,
        "prompt": 512,
        "rules": 100,
        "rule-tokens": 24,
        "repeats": 5,
        "loop-repeats": 2,
        "threads": os.cpu_count() or 1,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def measure(run: Callable, repeats: int) -> tuple:
    """The result of a first run that is not timed, and the median wall and CPU seconds of the others."""
    result, wall, cpu = run(), [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return result, statistics.median(wall), statistics.median(cpu)


def main() -> None:
    options = parse_arguments()
    import jax
    import numpy as np
    import torch
    import transformers

    from adaptrm.hf import load_weights, open_folder
    from adaptrm.judge.language_model import _answer_leaves
    from adaptrm.models import CausalLM
    from adaptrm.parallel import make_mesh
    from adaptrm.prefix_tree import Node, PrefixTree, choose_row_length, pack_rows

    torch.set_num_threads(options.threads)
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
    loop_model = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        loop_model.save_pretrained(folder)
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        definition, state, _ = load_weights(open_folder(folder), CausalLM, mesh, dtype="float32")

    rng = np.random.default_rng(0)
    conversation = rng.integers(0, options.vocab, options.prompt)
    rules = rng.integers(0, options.vocab, (options.rules, options.rule_tokens))
    answers = tuple(tuple(ids) for ids in rng.choice(options.vocab, (3, 2), replace=False).tolist())
    tree = PrefixTree.build(Node(conversation, [Node(rule) for rule in rules]))
    row_length, rows = choose_row_length([len(tree)], 1)
    packed = pack_rows([tree], rows, row_length, options.rules)

    def ours() -> np.ndarray:
        arrays = (packed.tokens, packed.positions, packed.subtree_end, packed.leaves)
        with jax.set_mesh(mesh):
            return np.asarray(_answer_leaves(definition, answers, "float32", state, *arrays))[0]

    sequences = [torch.from_numpy(np.concatenate([conversation, rule]))[None] for rule in rules]

    def loop() -> np.ndarray:
        found = []
        with torch.no_grad():
            for ids in sequences:
                logits = loop_model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
                log_p = torch.log_softmax(logits, -1)
                found.append(torch.stack([torch.logsumexp(log_p[list(ids)], -1) for ids in answers]))
        return torch.stack(found).numpy()

    tree_answers, tree_seconds, tree_cpu = measure(ours, options.repeats)
    loop_answers, loop_seconds, loop_cpu = measure(loop, options.loop_repeats)
    difference = float(np.abs(tree_answers - loop_answers).max())
    result = {
        "tree_seconds": round(tree_seconds, 3),
        "loop_seconds": round(loop_seconds, 3),
        "ratio": round(loop_seconds / tree_seconds, 2),
        "tree_cpu_seconds": round(tree_cpu, 3),
        "loop_cpu_seconds": round(loop_cpu, 3),
        "cpu_ratio": round(loop_cpu / tree_cpu, 2),
        "max_difference": difference,
        "largest_absolute_value": float(np.abs(loop_answers).max()),
        "tree_tokens": len(tree),
        "row_tokens": row_length * len(rows),
        "loop_tokens": options.rules * (options.prompt + options.rule_tokens),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if not difference < 1e-3:
        sys.exit("the two sides do not agree")


if __name__ == "__main__":
    main()
