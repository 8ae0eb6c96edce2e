"""The loss of a packed batch and its gradient, beside TRL's RewardTrainer on the same pairs and a tiny model."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import pair_rows, write_rows
from flax import nnx
from tiny import tiny_causal_lm, tiny_pairs

from adaptrm.config import DataOptions, LossOptions, parse_options
from adaptrm.data.plan import Plan, PlanOptions
from adaptrm.train.examples import reward_examples
from adaptrm.train.loop import device_batches
from adaptrm.train.save import save_model
from adaptrm.train.start import start_of
from adaptrm.train.step import loss_sums

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

COUNT, ROW = 6, 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device) -> Path:
    """A tiny reward model whose rewards are far from zero, and pairs with margins."""
    out = tmp_path_factory.mktemp("trl")
    tiny_causal_lm(out / "lm")
    start = start_of("reward", parse_options({"model": {"pretrained": str(out / "lm")}}, "test"))
    _, params = start.params(one_device, seed=0)
    weight = dict(nnx.to_flat_state(params))[("score", "weight")]
    weight.set_value(3 * jax.random.normal(jax.random.key(1), weight.shape))
    save_model(out / "rm", params, start.raw, start.chat, start.pad)
    pairs = [replace(p, preferred="a", margin=0.25 * i) for i, p in enumerate(tiny_pairs(COUNT))]
    write_rows(out / "pairs.jsonl", pair_rows(pairs))
    return out


@pytest.fixture(scope="module")
def trainer(folder):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    message = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = [
        {
            "prompt": [dict(m) for m in pair.prompt],
            "chosen": message(pair.response_a),
            "rejected": message(pair.response_b),
            "margin": 0.25 * i,
        }
        for i, pair in enumerate(tiny_pairs(COUNT))
    ]
    arguments = trl.RewardConfig(
        output_dir=str(folder / "trl"),
        max_length=None,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        disable_dropout=True,
    )
    return trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "rm", dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "rm"),
    )


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(margin=True, center_rewards=0.1)])
def test_loss_and_gradient_equal_trl(folder, trainer, one_device, options):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(COUNT)])
    if not options.margin:
        del batch["margin"]
    trainer.args.center_rewards_coefficient = options.center_rewards or None
    trainer.model.zero_grad()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    start = start_of("reward", parse_options({"model": {"pretrained": str(folder / "rm")}}, "test"))
    definition, params = start.params(one_device, seed=0)
    data = DataOptions(str(folder / "pairs.jsonl"), "human", row_length=ROW)
    store, _ = reward_examples(data, start.chat, start.pad[1], options)
    plan = Plan(store.lengths, store.leaves, PlanOptions(ROW, 1, COUNT), 1)

    @jax.jit
    def mean(params, batch):
        sums = loss_sums("reward", definition, params, batch, None, "float32", "none", options)
        return sums["loss"] / sums["weight"]

    ours, gradient = jax.value_and_grad(mean)(params, next(device_batches(store, plan, one_device, 0, 1)))
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    flat = dict(nnx.to_flat_state(gradient))
    for path in ("score", "model.embed_tokens", "model.norm"):
        got = np.asarray(flat[(*path.split("."), "weight")][...])
        want = trainer.model.get_parameter(f"{path}.weight").grad.numpy()
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), path
