"""Training a reward model: packed shared-prompt rows against TRL's RewardTrainer and against plain packing.

All sides run one whole epoch of the same pairs in float32 in one process on the same cores, from the same weights, with
AdamW at a learning rate of 0: weights stay, so the mean loss of the epoch has to be the same on every side. The model
has the first layers of MODEL and a fresh reward head. The sides:

    shared       adaptrm: a prompt once, then both responses, packed by best fit
    unshared     adaptrm: both conversations in full, packed by the same best fit
    trl          TRL, batches in random order, padded to their longest
    trl_grouped  TRL, batches grouped by length as transformers' group_by_length does for a large data set: sorted by
                 length within 50 batches

Steps of adaptrm hold about as many pairs as a batch of TRL does. A first step of each side, with compilation, is left
out. The sides take turns, a step each, so that a machine that becomes slower does so for all of them. Seconds are of
the clock and of the processor (these say more where other work shares the cores). Prints JSON.

    python tools/bench_train.py --model SMOLLM2 --pairs hh=hh.jsonl.gz --pairs rewardbench=rewardbench.jsonl.gz
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# torch's waiting threads would otherwise spin on the cores that the other side, or anything else, computes on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

SIDES = ("shared", "unshared", "trl", "trl_grouped")
TOLERANCE = 1e-4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="causal language model: a Hugging Face folder")
    parser.add_argument("--pairs", action="append", required=True, metavar="NAME=FILE", help="repeatable")
    sizes = {"layers": 2, "batch": 32, "batches": 16, "row-length": 2048, "longest": 1024, "seed": 0}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


class Clock:
    """Seconds of one of several programs that take turns."""

    def __init__(self, ring: deque["Clock"]):
        self.wall = self.cpu = 0.0
        self.may_run = threading.Semaphore(0)
        self._ring = ring

    def start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        wall, cpu = self._since
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    def turn(self) -> None:
        """Stop, let each of the others run as far as its next turn, go on."""
        self.stop()
        self._ring.rotate(-1)
        self._ring[0].may_run.release()
        self.may_run.acquire()
        self.start()


def in_turns(programs: dict[str, Callable[[Clock], Any]]) -> dict[str, Any]:
    """What the programs give: each has a thread of its own, and one of them runs at a time."""
    ring: deque[Clock] = deque()
    clocks = {name: Clock(ring) for name in programs}
    ring.extend(clocks.values())

    def run(name: str) -> Any:
        clocks[name].may_run.acquire()
        try:
            return programs[name](clocks[name])
        finally:
            ring.popleft()
            if ring:
                ring[0].may_run.release()

    with ThreadPoolExecutor(len(programs)) as pool:
        found = {name: pool.submit(run, name) for name in programs}
        ring[0].may_run.release()
        return {name: future.result() for name, future in found.items()}


def make_classifier(model: str, layers: int, out: Path) -> None:
    """The first layers of a causal language model with a fresh reward head, as a Hugging Face folder."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from adaptrm.data.chat import ChatTokenizer, choose_pad_token

    chat = ChatTokenizer.from_folder(model)
    pad = choose_pad_token(chat)
    config = AutoConfig.from_pretrained(model, num_hidden_layers=layers, num_labels=1, pad_token_id=pad[1])
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, config=config, dtype=torch.float32)
    classifier.save_pretrained(out)
    chat.save(out, pad[0])


def sample(chat, file: str, options: argparse.Namespace) -> list:
    """A random sample of whole batches of pairs, none longer than ``longest``."""
    from adaptrm.data.chat_trees import pair_length
    from adaptrm.data.preferences import load_pairs

    pairs = [pair for pair in load_pairs(file) if pair_length(chat, pair) <= options.longest]
    count = min(options.batches, len(pairs) // options.batch) * options.batch
    if not count:
        sys.exit(f"{file}: fewer than {options.batch} pairs of at most {options.longest} tokens")
    order = np.random.default_rng(options.seed).permutation(len(pairs))[:count]
    return [pairs[i] for i in sorted(order)]


def flat_tree(chat, pair):
    """Both conversations in full, side by side: what packing is without a shared prompt."""
    from adaptrm.data.chat_trees import conversation_tree
    from adaptrm.prefix_tree import PrefixTree

    first, second = (conversation_tree(chat, [pair.conversation(side)], None) for side in "ab")
    return PrefixTree(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.positions, second.positions]),
        np.concatenate([first.subtree_end, second.subtree_end + len(first)]),
        np.concatenate([first.leaves, second.leaves + len(first)]),
    )


def ours(
    clock: Clock, folder: Path, chat, pairs: list, make_tree: Callable, options: argparse.Namespace
) -> dict[str, Any]:
    """One epoch of adaptrm's step over packed rows."""
    import jax

    from adaptrm.config import LossOptions, OptimizerOptions
    from adaptrm.data.pipeline import TreeStore
    from adaptrm.data.plan import Plan, PlanOptions
    from adaptrm.hf import load_weights, open_folder
    from adaptrm.models import SequenceClassifier
    from adaptrm.parallel import make_mesh
    from adaptrm.train.feed import device_batches
    from adaptrm.train.optimizer import make_optimizer
    from adaptrm.train.state import init_state
    from adaptrm.train.step import make_step

    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    store = TreeStore()
    for pair in pairs:
        store.append(make_tree(chat, pair), [float(pair.preferred == side) for side in "ab"], 1.0)
    store.freeze()
    rows = max(1, round(options.batch * float(np.mean(store.lengths)) / options.row_length))
    plan = Plan(store.lengths, store.leaves, PlanOptions(options.row_length, rows, None, options.seed), 1)
    definition, params, _ = load_weights(open_folder(folder), SequenceClassifier, mesh, dtype="float32")
    optimizer = OptimizerOptions(learning_rate=0.0, schedule="constant", warmup_steps=0)
    steps = plan.steps_per_epoch
    step = make_step("reward", definition, optimizer, steps, None, "float32", "none", LossOptions())
    state = init_state(params, make_optimizer(optimizer), mesh)

    sums = np.zeros(2)
    with jax.set_mesh(mesh):
        # Waited for: it would run on into the epoch's time.
        state, _ = jax.block_until_ready(step(state, next(device_batches(store, plan, mesh, 0, 1))))
        clock.start()
        for batch in device_batches(store, plan, mesh, 0, steps):
            state, metrics = step(state, batch)
            sums += float(metrics["loss"]) * float(metrics["weight"]), float(metrics["weight"])
            clock.turn()
        clock.stop()
    assert sums[1] == len(pairs)
    computed = steps * plan.rows_per_step * options.row_length
    tokens = int(np.sum(store.lengths))
    return figures(clock, len(pairs), sums[0] / sums[1], steps, tokens, computed)


def theirs(clock: Clock, folder: Path, pairs: list, grouped: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One epoch of TRL's RewardTrainer."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, TrainerCallback
    from transformers.trainer_pt_utils import get_length_grouped_indices

    def row(pair) -> dict:
        sides = {"chosen": pair.response_a, "rejected": pair.response_b}
        if pair.preferred == "b":
            sides = {"chosen": pair.response_b, "rejected": pair.response_a}
        prompt = [dict(m) for m in pair.prompt]
        return {"prompt": prompt} | {k: [{"role": "assistant", "content": v}] for k, v in sides.items()}

    class Counting(trl.RewardTrainer):
        """Counts what it computes and what of that is text."""

        text = computed = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.computed += inputs["input_ids"].numel()
            self.text += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _get_train_sampler(self, *given):
            if not grouped:
                return super()._get_train_sampler(*given)
            columns = self.train_dataset["chosen_ids"], self.train_dataset["rejected_ids"]
            longest = [max(map(len, both)) for both in zip(*columns, strict=True)]
            return get_length_grouped_indices(longest, options.batch, mega_batch_mult=50)

    class Turns(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.turn()

    def trainer(out: str, steps: int):
        torch.manual_seed(options.seed)
        arguments = trl.RewardConfig(
            output_dir=out,
            per_device_train_batch_size=options.batch,
            max_steps=steps,
            learning_rate=0.0,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            disable_tqdm=True,
            disable_dropout=True,
        )
        made = Counting(
            model=AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list([row(pair) for pair in pairs]),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        made.remove_callback(PrinterCallback)  # it prints on stdout
        return made

    steps = len(pairs) // options.batch
    with tempfile.TemporaryDirectory() as out:
        trainer(out, 1).train()  # a first step, which is not timed
        run = trainer(out, steps)
        run.add_callback(Turns())
        clock.start()
        run.train()
        clock.stop()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == steps
    return figures(clock, len(pairs), float(np.mean(losses)), steps, run.text, run.computed)


def figures(clock: Clock, pairs: int, loss: float, steps: int, tokens: int, computed: int) -> dict[str, Any]:
    return {
        "pairs_per_second": round(pairs / clock.wall, 3),
        "pairs_per_cpu_second": round(pairs / clock.cpu, 3),
        "seconds": round(clock.wall, 1),
        "cpu_seconds": round(clock.cpu, 1),
        "mean_loss": loss,
        "steps": steps,
        "text_tokens": tokens,
        "computed_tokens": computed,
        "padding": round(1 - tokens / computed, 4),
    }


def compare(folder: Path, file: str, options: argparse.Namespace) -> dict[str, Any]:
    """All sides on one set of pairs."""
    from adaptrm.data.chat import ChatTokenizer
    from adaptrm.data.chat_trees import pair_tree

    chat = ChatTokenizer.from_folder(folder)
    pairs = sample(chat, file, options)
    print(f"{file}: {len(pairs)} pairs", file=sys.stderr, flush=True)
    found = in_turns(
        {
            "shared": lambda clock: ours(clock, folder, chat, pairs, lambda c, pair: pair_tree(c, pair, None), options),
            "unshared": lambda clock: ours(clock, folder, chat, pairs, flat_tree, options),
            "trl": lambda clock: theirs(clock, folder, pairs, False, options),
            "trl_grouped": lambda clock: theirs(clock, folder, pairs, True, options),
        }
    )
    ratios = {
        f"shared_to_{name}": {
            rate: round(found["shared"][rate] / found[name][rate], 2)
            for rate in ("pairs_per_second", "pairs_per_cpu_second")
        }
        for name in SIDES[1:]
    }
    losses = [found[name]["mean_loss"] for name in SIDES]
    return {"pairs": len(pairs), "ratios": ratios, "loss_gap": max(losses) - min(losses), "sides": found}


def main() -> None:
    options = parse_arguments()
    import jax
    import torch
    import transformers
    import trl

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        make_classifier(options.model, options.layers, Path(folder))
        sets = dict(given.split("=", 1) for given in options.pairs)
        found = {name: compare(Path(folder), file, options) for name, file in sets.items()}
    result = {
        "sets": found,
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "model", "pairs")},
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers, trl)},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if not all(one["loss_gap"] <= TOLERANCE for one in found.values()):
        sys.exit("the sides do not agree on the loss")


if __name__ == "__main__":
    main()
