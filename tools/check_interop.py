"""Does an exported reward model give the same scores in the tools that people load it with?

Writes pairs of conversations of unequal lengths, turns and scripts (and rows of --pairs), scores them with adaptrm in
float32, and with each consumer by its own code in its own environment. Prints one JSON: of each consumer the largest
difference, as a share of the largest score where that is above 1, and the pairs whose verdict is another although the
two scores differ by more than 1e-4. Ends with an error where a difference is above 1e-4.

    python tools/check_interop.py REWARD_MODEL --transformers-5 venv-transformers-5/bin/python
    python tools/check_interop.py REWARD_MODEL --transformers-5 PY --transformers-4 PY --rewardbench PY --trl PY \\
        --openrlhf PY --pairs PAIRS --limit 16

docs/interop.md says how the environments are made. What a consumer is asked:

    transformers   AutoModelForSequenceClassification on batches padded right and left; the text-classification
                   pipeline as it is by default, which tokenizes the rendered text and adds what the tokenizer adds
    rewardbench    the command line on a local JSON, and `adaptrm evaluate --suite pairs` on the same file, row by row
    trl            RewardTrainer's prediction through its own data pipeline; GRPOTrainer with the folder as reward
    openrlhf       get_llm_for_sequence_regression and its tokenizer, padded left as its reward server does; it loads
                   in bfloat16 alone, so both sides read a copy of the weights rounded to that, and compute in float32
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

TOLERANCE = 1e-4
BATCH = 4
WORDS = "Bread needs flour, water, salt, yeast and time; knead it, let it rest, and bake it hot. "
# Prompt (user and assistant in turn), chosen, rejected.
BUILT_IN = [
    (["Hi"], "Hello!", "No."),
    (["How do I bake bread?"], WORDS * 12, "Mix, wait, bake."),
    (["How do I bake bread?", "In an oven.", "And before that?"], "Knead it.", WORDS * 30),
    (["Was ist ein Roggenbrot?"], "Ein Brot aus Roggenmehl — kräftig, säuerlich, haltbar.", "パンです。ライ麦の。"),
    (["Print 1 to 9."], "```python\nfor i in range(1, 10):\n    print(i)\n```\n", "1 2 3\n4 5 6\n\n7 8 9\n\n\n"),
    (["a" * 300], "🙂🙂 \t «x» \u200b end", " leading and trailing spaces  "),
    (["One.", "Two.", "Three.", "Four.", "Five."], "Six.", WORDS * 3),
]

Rows = list[dict[str, list[dict[str, str]]]]
Scores = dict[str, list[list[float]]]


def built_in() -> Rows:
    """``chosen`` and ``rejected`` as lists of messages: the form that all consumers read."""
    rows = []
    for turns, *responses in BUILT_IN:
        prompt = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        replies = [[*prompt, {"role": "assistant", "content": text}] for text in responses]
        rows.append(dict(zip(("chosen", "rejected"), replies, strict=True)))
    return rows


# --- what runs in a consumer's environment: nothing of adaptrm -------------------------------------------------------


def paired(scores: list[float]) -> list[list[float]]:
    """Scores of chosen, rejected, chosen, ... by pair."""
    return [scores[i : i + 2] for i in range(0, len(scores), 2)]


def batches(rows: Rows) -> Iterator[list]:
    conversations = iter([row[side] for row in rows for side in ("chosen", "rejected")])
    while some := list(islice(conversations, BATCH)):
        yield some


def with_transformers(model: str, rows: Rows, folder: Path) -> Scores:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model).float().eval()
    found = {"padded right": [], "padded left": [], "text-classification pipeline": []}
    for some in batches(rows):
        texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in some]
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            with torch.no_grad():
                logits = classifier(**batch).logits
            found[f"padded {side}"] += logits[:, 0].tolist()
        ask = pipeline("text-classification", model=classifier, tokenizer=tokenizer, device="cpu")
        found["text-classification pipeline"] += [told["score"] for told in ask(texts, batch_size=BATCH)]
    return {name: paired(scores) for name, scores in found.items()}


def with_trl(model: str, rows: Rows, folder: Path) -> Scores:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

    # TRL's defaults compute in bfloat16 and leave out conversations of more than 1,024 tokens.
    shared = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none"}
    options = RewardConfig(str(folder / "reward"), per_device_eval_batch_size=BATCH, max_length=None, **shared)
    # Filled up to whole batches: of the last one that is not, predict() keeps half.
    data = Dataset.from_list(rows + rows[:1] * (-len(rows) % BATCH))
    trainer = RewardTrainer(model, args=options, train_dataset=data, eval_dataset=data)
    logits = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions).reshape(-1)
    # Of each batch the chosen come first, then the rejected.
    found = [torch.stack(some.chunk(2), 1) for some in logits.split(2 * BATCH)]

    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    options = GRPOConfig(str(folder / "grpo"), per_device_train_batch_size=BATCH, num_generations=BATCH, **shared)
    prompts = Dataset.from_list([{"prompt": row["chosen"][:-1]} for row in rows])
    grpo = GRPOTrainer(policy, reward_funcs=model, args=options, train_dataset=prompts, processing_class=tokenizer)
    rewards = []
    for some in batches(rows):
        turns = [one[:-1] for one in some], [one[-1:] for one in some]
        rewards += grpo._calculate_rewards([{}] * len(some), *turns, [[]] * len(some))[:, 0].tolist()
    return {"RewardTrainer": torch.cat(found)[: len(rows)].tolist(), "GRPOTrainer reward_funcs": paired(rewards)}


def with_openrlhf(model: str, rows: Rows, folder: Path) -> Scores:
    import torch
    from openrlhf.models import get_llm_for_sequence_regression
    from openrlhf.utils import get_tokenizer

    classifier = get_llm_for_sequence_regression(model, "reward", attn_implementation="sdpa").float().eval()
    tokenizer = get_tokenizer(model, classifier, "left", None)
    found = []
    for some in batches(rows):
        texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in some]
        batch = tokenizer(texts, return_tensors="pt", add_special_tokens=False, padding=True)
        with torch.no_grad():
            found += classifier(batch["input_ids"], batch["attention_mask"]).tolist()
    return {"get_llm_for_sequence_regression": paired(found)}


Consumer = Callable[[str, Rows, Path], Scores]
ASKED: dict[str, Consumer] = {"transformers": with_transformers, "trl": with_trl, "openrlhf": with_openrlhf}


def as_consumer(name: str, model: str, file: str, out: str) -> None:
    """Score a file of rows in this environment, and write the scores."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    Path(out).write_text(json.dumps({"scores": ASKED[name](model, rows, Path.cwd())}))


def rewardbench_command(*arguments: str) -> None:
    """``rewardbench ARGUMENTS``, which moves each batch to "cuda" by name: where there is none it stays on the CPU."""
    import torch
    from rewardbench.rewardbench import main as command_line
    from transformers import BatchEncoding

    if not torch.cuda.is_available():
        BatchEncoding.to = lambda batch, device: batch
    sys.argv = ["rewardbench", *arguments]
    command_line()


# --- what asks them --------------------------------------------------------------------------------------------------


def run(*command: str, folder: Path) -> str:
    """What a command in a scratch folder prints, offline; what it says is shown where it fails."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE",  # flash-attn's other kernels, for OpenRLHF where there is no CUDA
    }
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{' '.join(command)} failed")
    return done.stdout


def program(text: str) -> str:
    """An absolute path: it is run in another folder."""
    if (found := shutil.which(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no program")
    return str(Path(found).absolute())


def versions(python: str, *packages: str, folder: Path) -> dict[str, str]:
    asking = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    return json.loads(run(python, "-c", asking, *packages, folder=folder))


def asked(python: str, name: str, model: str, file: Path, folder: Path) -> dict:
    run(python, str(Path(__file__).resolve()), "--as", name, model, str(file), "scores.json", folder=folder)
    return json.loads((folder / "scores.json").read_text())


def by_rewardbench(python: str, model: str, file: Path, folder: Path) -> dict:
    """Its command line. It writes under results/MODEL, so the model gets a short name."""
    (folder / "model").symlink_to(model)
    flags = ("--load_json", "--not_quantized", "--torch_dtype", "float32", "--batch_size", str(BATCH))
    command = (python, str(Path(__file__).resolve()), "--rewardbench-command")
    run(*command, "--model", "model", "--dataset", str(file), *flags, folder=folder)
    lines = (folder / "results/model_outputs.jsonl").read_text().splitlines()
    scores = [[row["scores_chosen"], row["scores_rejected"]] for row in map(json.loads, lines)]
    whole = json.loads((folder / "results/model.json").read_text())
    return {"accuracy": whole["accuracy"], "scores": {"command line": scores}}


def by_evaluate(model: str, file: Path, folder: Path) -> dict:
    """``adaptrm evaluate`` on the same file."""
    import pyarrow.parquet as pq

    verb = ("evaluate", model, "--suite", "pairs", "--data", str(file), "--out", "ours.json")
    run(sys.executable, "-c", "from adaptrm.cli import main; main()", *verb, folder=folder)
    scores = pq.read_table(folder / "ours.rows.parquet")["scores"].to_pylist()
    return {"accuracy": json.loads((folder / "ours.json").read_text())["accuracy"], "scores": {"rows": scores}}


def compared(found: dict, ours: list[list[float]]) -> dict:
    """Of each way a consumer was asked: how far its scores are from ours, and how many verdicts are others."""
    import numpy as np

    y, ways = np.array(ours), {}
    for name, x in ((name, np.array(scores)) for name, scores in found["scores"].items()):
        other = ((x[:, 0] > x[:, 1]) != (y[:, 0] > y[:, 1])) & (np.abs(y[:, 0] - y[:, 1]) > TOLERANCE)
        difference = float(np.abs(x - y).max() / max(1.0, np.abs(y).max()))
        ways[name] = {"difference": difference, "other_verdicts": int(other.sum())}
    return {name: found[name] for name in found.keys() - {"scores"}} | {"ways": ways}


def readable(source: str, chat) -> Iterator[dict]:
    """Rows that all consumers read alike: RewardBench calls the turns user and assistant whatever they are, and what
    looks like a special token is text to adaptrm and a special token to the others."""
    from adaptrm.data.preferences import read_pairs

    for pair in read_pairs(source):
        sides = "ba" if pair.preferred == "b" else "ab"
        chosen, rejected = ([dict(message) for message in pair.conversation(side)] for side in sides)
        alternate = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(chosen))
        if alternate and not chat.special_strings("".join(m["content"] for m in [*chosen, *rejected])):
            yield {"chosen": chosen, "rejected": rejected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported reward model: a folder")
    for name in ("transformers-5", "transformers-4", "rewardbench", "trl", "openrlhf"):
        parser.add_argument(f"--{name}", metavar="PY", type=program, help="python of an environment that has it")
    parser.add_argument("--pairs", action="append", default=[], help="rows to score beside the built-in ones")
    parser.add_argument("--limit", type=int, default=16, help="of each --pairs, the first rows that all can read")
    options = parser.parse_args()

    from adaptrm import RewardModel

    model = str(Path(options.model).resolve())
    reward_model = RewardModel.from_pretrained(model)
    rows = built_in()
    for source in options.pairs:
        rows += islice(readable(source, reward_model.chat), options.limit)
    conversations = [row[side] for row in rows for side in ("chosen", "rejected")]
    lengths = [len(reward_model.chat.encode_chat(one)) for one in conversations]
    ours = paired(reward_model.score(conversations).tolist())

    told: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "pairs.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        for option in ("transformers_5", "transformers_4", "trl"):
            if python := getattr(options, option):
                told[option] = compared(asked(python, option.split("_")[0], model, file, folder), ours)
        if options.rewardbench:
            evaluated = by_evaluate(model, file, folder)
            told["evaluate"] = compared(evaluated, ours)
            theirs = by_rewardbench(options.rewardbench, model, file, folder)
            told["rewardbench"] = compared(theirs, evaluated["scores"]["rows"])
        if options.openrlhf:
            RewardModel.from_pretrained(model, "bfloat16").save_pretrained(folder / "rounded")
            rounded = RewardModel.from_pretrained(folder / "rounded").score(conversations).tolist()
            found = asked(options.openrlhf, "openrlhf", str(folder / "rounded"), file, folder)
            told["openrlhf"] = compared(found, paired(rounded))
        for name in told.keys() - {"evaluate"}:
            packages = sorted({name.split("_")[0], "transformers", "torch"})
            told[name]["versions"] = versions(getattr(options, name), *packages, folder=folder)
    result = {"pairs": len(rows), "tokens_a_conversation": [min(lengths), max(lengths)], "consumers": told}
    print(json.dumps(result, indent=2))
    ways = [way for found in told.values() for way in found["ways"].values()]
    if not all(way["difference"] <= TOLERANCE and not way["other_verdicts"] for way in ways):
        sys.exit("a consumer gives other scores")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        as_consumer(*sys.argv[2:])
    elif sys.argv[1:2] == ["--rewardbench-command"]:
        rewardbench_command(*sys.argv[2:])
    else:
        main()
