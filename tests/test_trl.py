"""Twenty steps of ``train reward`` from SmolLM2 beside TRL's RewardTrainer on the same batches (slow)."""

import gzip
import json

import numpy as np
import pytest
import yaml
from commands import adaptrm, losses

from adaptrm.config import parse_options
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.chat_trees import pair_tree
from adaptrm.data.plan import Plan, PlanOptions
from adaptrm.data.preferences import load_pairs, pairs_of_row
from adaptrm.parallel import make_mesh
from adaptrm.train.save import save_model
from adaptrm.train.start import start_of

pytestmark = pytest.mark.slow

STEPS, PAIRS, LONGEST, ROW = 20, 4, 160, 512


@pytest.fixture(scope="module")
def model_folder(smollm2, tmp_path_factory):
    """SmolLM2 with a fresh head, as a sequence classifier that both sides start from."""
    options = parse_options({"model": {"pretrained": str(smollm2)}}, "test")
    start = start_of("reward", options)
    mesh = make_mesh()
    _, params = start.params(mesh, seed=0)
    out = tmp_path_factory.mktemp("classifier")
    save_model(out, params, start.raw, start.chat, start.pad)
    return out


@pytest.fixture(scope="module")
def pairs_file(data, smollm2, tmp_path_factory):
    """Short pairs of HH-RLHF harmless, so that twenty steps take minutes on two cores."""
    chat = ChatTokenizer.from_folder(smollm2)
    out = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    kept = 0
    with gzip.open(data / "pairs" / "hh_harmless_base_test.jsonl.gz", "rt") as rows, out.open("w") as sink:
        for line in rows:
            pair = next(iter(pairs_of_row(json.loads(line), "hh")))
            if kept < STEPS * PAIRS and max(len(chat.encode_chat(pair.conversation(s))) for s in "ab") <= LONGEST:
                sink.write(line)
                kept += 1
    assert kept == STEPS * PAIRS
    return out


def test_losses_follow_trl(model_folder, pairs_file, tmp_path):
    trl = pytest.importorskip("trl")
    torch = pytest.importorskip("torch")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    section = {
        "model": {"pretrained": str(model_folder)},
        "data": {
            "pairs": str(pairs_file),
            "labels": "human",
            "row_length": ROW,
            "exact_batch": True,
            "pairs_per_step": PAIRS,
        },
        "optimizer": {"learning_rate": 2e-5, "schedule": "linear", "warmup_steps": 10},
        "max_steps": STEPS,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"reward": section}))
    adaptrm("train", "reward", tmp_path / "config.yaml", "--out", tmp_path / "run", long=True)
    ours = [line["loss"] for line in losses(tmp_path / "run")]

    # The order in which our plan takes the pairs, as TRL's data set, read without shuffling.
    pairs = load_pairs(pairs_file)
    chat = ChatTokenizer.from_folder(model_folder)
    lengths = [len(pair_tree(chat, pair, None)) for pair in pairs]
    plan = Plan(lengths, [2] * len(pairs), PlanOptions(ROW, 1, PAIRS, 0), 1)
    order = [i for step in range(STEPS) for row in range(plan.rows_per_step) for i in plan.row(step, row)]
    assert sorted(order) == list(range(len(pairs)))
    rows = [
        {
            "prompt": [dict(m) for m in pairs[i].prompt],
            "chosen": [{"role": "assistant", "content": pairs[i].response_a}],
            "rejected": [{"role": "assistant", "content": pairs[i].response_b}],
        }
        for i in order
    ]

    class InOrder(trl.RewardTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    torch.manual_seed(0)
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        warmup_steps=10,
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
    trainer = InOrder(
        model=AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    # The texts went through TRL's own tokenisation: the same token ids must have come out.
    first = trainer.train_dataset[0]
    assert first["chosen_ids"] == chat.encode_chat(pairs[order[0]].conversation("a")).tolist()
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    gap = np.abs(np.asarray(ours) - np.asarray(theirs))
    print(json.dumps({"adaptrm": ours, "trl": theirs, "gap_first_10": gap[:10].max(), "gap": gap.max()}))
    assert len(ours) == len(theirs) == STEPS
    assert gap[:10].max() <= 1e-3
    assert gap.max() <= 1e-2
