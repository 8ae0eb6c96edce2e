"""One epoch on real safety preferences: held-out accuracy by source, beside TRL's and beside trivial scorers.

Takes pairs of HH-RLHF harmless, RMB harmless and XSTest, split by prompt; trains a reward model from MODEL with adaptrm
and with TRL's RewardTrainer, from the same weights, on the same batches, with the same settings; and measures both on
the held-out pairs. Accuracies come with 95 % intervals that resample prompts, since a prompt may have many pairs. The
trivial scorers: the longer response; more words of refusal; logistic regression on TF-IDF of the words of
the responses (scikit-learn), fitted on the training pairs. XSTest is shown in two halves, since a model that refuses
everything is right on one of them. Prints JSON.

    pip install trl scikit-learn
    python tools/learn_real.py --model SMOLLM2 --data DATA/pairs --out learned.json
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

# Source -> file, training pairs and held-out pairs.
SOURCES = {
    "hh-harmless": ("hh_harmless_base_test.jsonl.gz", 60, 100),
    "rmb-harmless": ("rmb_harmless_pairs.jsonl.gz", 60, 100),
    "xstest": ("xstest_pairs.jsonl.gz", 40, 64),
}
RESAMPLES = 10_000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="causal language model: a Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="folder of the three files of pairs")
    parser.add_argument("--longest", type=int, default=384, help="tokens of a conversation; longer ones are left out")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--share", type=float, default=1.0, help="of the pairs of each source, to try it out")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def split(chat, options: argparse.Namespace) -> tuple[list, list]:
    """Training and held-out pairs, each with its source in ``subset``; no prompt is in both."""
    from adaptrm.data.chat_trees import pair_length
    from adaptrm.data.preferences import load_pairs

    train, held_out = [], []
    for source, (file, for_training, for_testing) in SOURCES.items():
        pairs = load_pairs(options.data / file)
        order = np.random.default_rng(0).permutation(len(pairs))
        parts: tuple[list, list] = ([], [])
        sizes = [max(1, int(n * options.share)) for n in (for_training, for_testing)]
        for pair in (pairs[i] for i in order):
            part = hash_of(pair) % 2  # by prompt
            if len(parts[part]) < sizes[part] and pair_length(chat, pair) <= options.longest:
                named = source if source != "xstest" else pair.subset
                parts[part].append(replace(pair, subset=named))
        train += parts[0]
        held_out += parts[1]
    batches = len(train) // options.batch
    order = np.random.default_rng(1).permutation(len(train))[: batches * options.batch]
    return [train[i] for i in order], held_out


def hash_of(pair) -> int:
    from adaptrm.data.preferences import hash_id

    return hash_id(json.dumps([dict(m) for m in pair.prompt]))


def ours(model: Path, pairs_file: Path, out: Path, options: argparse.Namespace) -> None:
    """``adaptrm train reward`` on exactly the batches of TRL: one batch a step."""
    from adaptrm.config import parse_options
    from adaptrm.train.run import train

    section = {
        "model": {"pretrained": str(model)},
        "data": {
            "pairs": str(pairs_file),
            "labels": "human",
            "row_length": 1024,
            "exact_batch": True,
            "pairs_per_step": options.batch,
        },
        "optimizer": {"learning_rate": options.learning_rate, "schedule": "linear", "warmup_steps": 2},
        "checkpoint": {"every_steps": 10_000},
    }
    train("reward", parse_options(section, "learn_real"), out)


def order_of_ours(chat, pairs: list, options: argparse.Namespace) -> list[int]:
    """In which order adaptrm takes the pairs."""
    from adaptrm.data.chat_trees import pair_tree
    from adaptrm.data.plan import Plan, PlanOptions

    lengths = [len(pair_tree(chat, pair, None)) for pair in pairs]
    plan = Plan(lengths, [2] * len(pairs), PlanOptions(1024, 1, options.batch, 0), 1)
    steps, rows = range(plan.steps_per_epoch), range(plan.rows_per_step)
    return [int(i) for step in steps for row in rows for i in plan.row(step, row)]


def theirs(model: Path, pairs: list, out: Path, options: argparse.Namespace) -> None:
    """TRL's RewardTrainer on the pairs in the order given."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback

    def row(pair) -> dict:
        responses = (pair.response_a, pair.response_b)
        chosen, rejected = responses if pair.preferred == "a" else responses[::-1]
        sides = {"chosen": chosen, "rejected": rejected}
        return {"prompt": [dict(m) for m in pair.prompt]} | {
            name: [{"role": "assistant", "content": text}] for name, text in sides.items()
        }

    class InOrder(trl.RewardTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = trl.RewardConfig(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=options.batch,
        num_train_epochs=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        report_to=[],
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        disable_dropout=True,
    )
    trainer = InOrder(
        model=AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([row(pair) for pair in pairs]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.remove_callback(PrinterCallback)  # it prints on stdout
    trainer.train()
    trainer.save_model(str(out / "model"))


def tfidf(train: list, held_out: list) -> np.ndarray:
    """What words alone say, learnt from the training pairs."""
    from adaptrm.evaluate.trivial import fit_tfidf

    scores = map(fit_tfidf(train, "the training pairs"), (pair.as_set() for pair in held_out))
    return np.array([a - b for a, b in scores])


def accuracy(margins: np.ndarray, pairs: list) -> dict[str, Any]:
    """Share of pairs whose preferred response has the higher score, by source; ties are wrong."""
    sign = np.asarray([1 if pair.preferred == "a" else -1 for pair in pairs])
    right = (np.asarray(margins) * sign > 0).astype(float)
    prompts = np.asarray([hash_of(pair) for pair in pairs], np.uint64)
    subsets = np.asarray([pair.subset for pair in pairs])
    groups = {"all": np.ones(len(pairs), bool)} | {str(name): subsets == name for name in sorted(set(subsets))}
    return {name: clustered(right[mask], prompts[mask]) for name, mask in groups.items()}


def clustered(right: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Mean, with an interval from resampling whole prompts."""
    _, of = np.unique(prompts, return_inverse=True)
    count, hits = np.bincount(of), np.bincount(of, weights=right)
    drawn = np.random.default_rng(0).integers(0, len(count), (RESAMPLES, len(count)))
    means = hits[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    interval = [round(float(x), 3) for x in np.quantile(means, (0.025, 0.975))]
    return {"accuracy": round(float(right.mean()), 3), "ci95": interval, "pairs": len(right), "prompts": len(count)}


def main() -> None:
    options = parse_arguments()
    import transformers

    from adaptrm.data.chat import ChatTokenizer
    from adaptrm.evaluate.trivial import refusal_words
    from adaptrm.parallel import make_mesh
    from adaptrm.reward_model import RewardModel
    from adaptrm.train.save import save_model
    from adaptrm.train.start import start_of

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = start_of("reward", model_options(options.model))
        # One fresh head for both sides.
        save_model(folder / "start", start.params(make_mesh(), seed=0)[1], start.raw, start.chat, start.pad)
        chat = ChatTokenizer.from_folder(folder / "start")
        train, held_out = split(chat, options)
        rows = (vars(pair) | {"prompt": [dict(m) for m in pair.prompt]} for pair in train)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seconds = {}
        print(f"{len(train)} pairs to train on, {len(held_out)} held out", file=sys.stderr, flush=True)
        clock = time.perf_counter()
        ours(folder / "start", folder / "train.jsonl", folder / "run", options)
        seconds["adaptrm"] = round(time.perf_counter() - clock)
        clock = time.perf_counter()
        theirs(folder / "start", [train[i] for i in order_of_ours(chat, train, options)], folder / "trl", options)
        seconds["trl"] = round(time.perf_counter() - clock)
        margins = {}
        for name, model in (("adaptrm", folder / "run"), ("trl", folder / "trl" / "model")):
            rewards = RewardModel.from_pretrained(model).score_pairs(held_out)
            margins[name] = rewards[:, 0] - rewards[:, 1]
    margins["tf-idf"] = tfidf(train, held_out)
    margins["longer"] = np.asarray([len(p.response_a.split()) - len(p.response_b.split()) for p in held_out])
    margins["more refusal words"] = np.array([a - b for a, b in map(refusal_words, (p.as_set() for p in held_out))])
    result = {
        "accuracy": {name: accuracy(values, held_out) for name, values in margins.items()},
        "same_verdict_as_trl": round(float(np.mean((margins["adaptrm"] > 0) == (margins["trl"] > 0))), 3),
        "largest_margin_difference_to_trl": float(np.abs(margins["adaptrm"] - margins["trl"]).max()),
        "training_pairs": len(train),
        "held_out_pairs": len(held_out),
        "training_seconds": seconds,
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "model", "data")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def model_options(model: str):
    from adaptrm.config import parse_options

    return parse_options({"model": {"pretrained": model}}, "learn_real")


if __name__ == "__main__":
    main()
