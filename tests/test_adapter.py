"""The Rule Adapter: what it learns from, what it chooses, and what a judge and a label make of its choice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import in_process, losses, pair_rows, write_rows
from refusals import refused
from tiny import tiny_causal_lm, tiny_pool

import adaptrm
from adaptrm.config import DataOptions, parse_options
from adaptrm.data.chat import ChatTokenizer
from adaptrm.data.labels import read_labels
from adaptrm.data.preferences import Pair
from adaptrm.data.rows import source_hash
from adaptrm.data.scores import Scores, judged, read_batches, read_parts, write_manifest, write_part
from adaptrm.evaluate.rule_choice import evaluate_rules
from adaptrm.export import export_run
from adaptrm.health.check import check_scores
from adaptrm.judge.pair_prompt import pair_turn
from adaptrm.judge.score import ScoreJob, dry_run, score
from adaptrm.label import LabelJob, label
from adaptrm.rule_adapter import RuleAdapter
from adaptrm.train.adapter_examples import adapter_examples
from adaptrm.train.run import train

TOPICS = ("bread", "harm", "advice")
POOL = tiny_pool(6)
K = 2


def topic_pairs(count: int, seed: int) -> list[Pair]:
    """What a pair is about says which rules tell its responses apart: 2 i and 2 i + 1 of topic i."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        topic = TOPICS[i % 3]
        prompt = ({"role": "user", "content": f"{topic} " * 8},)
        a, b = (f"{topic} is {rng.choice(['kind', 'calm', 'true', 'honest'])}, {topic} {side}." for side in "xy")
        pairs.append(Pair(f"{seed}-{i}", prompt, *((a, b) if i % 2 else (b, a)), "ab"[i % 2], TOPICS[i % 3]))
    return pairs


def scores_of(pairs: list[Pair], seed: int = 0) -> Scores:
    """The rules of a pair's topic differ by a lot, in favour of what is preferred, the others by little."""
    rng = np.random.default_rng(seed)
    d = rng.uniform(-0.1, 0.1, (len(pairs), 6)).astype(np.float32)
    for row, pair in enumerate(pairs):
        topic = TOPICS.index(pair.subset)
        d[row, 2 * topic : 2 * topic + 2] = rng.uniform(0.5, 0.9, 2) * (1 if pair.preferred == "a" else -1)
    one = np.ones_like(d)
    return Scores([p.id for p in pairs], list(POOL.ids), d / 2, -d / 2, one * np.float32(0.5), d, -d, one, one)


def write_scores(folder: Path, pairs: Path, scores: Scores) -> str:
    manifest = {"rules": scores.rule_ids, "pairs": str(pairs), "pairs_sha256": source_hash(str(pairs))}
    write_manifest(folder, manifest | {"count": len(scores), "parts": 1, "pool_hash": POOL.hash})
    write_part(folder, 0, scores)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A language model, a pool, and pairs to train on and to measure on with their scores and labels."""
    out = tmp_path_factory.mktemp("adapter")
    tiny_causal_lm(out / "lm")
    (out / "pool.yaml").write_text(POOL.to_yaml())
    for name, pairs in (("train", topic_pairs(48, 1)), ("held", topic_pairs(12, 2))):
        file = write_rows(out / f"{name}.jsonl", pair_rows(pairs))
        write_scores(out / f"{name}-scores", file, scores_of(pairs))
        label(LabelJob(str(out / f"{name}-scores"), str(out / f"{name}-labels.jsonl"), k=K))
    return out


def options(made: Path, steps: int = 16, data: dict | None = None, **more):
    learnt = data or {"pairs": str(made / "train.jsonl"), "labels": str(made / "train-labels.jsonl")}
    section = {
        "model": {"pretrained": str(made / "lm"), "remat": "none"},
        "data": {"rules": str(made / "pool.yaml"), "row_length": 256, "rows_per_step": 8} | learnt,
        "loss": {"k": K},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "epochs": 99,
        "max_steps": steps,
    }
    return parse_options(section | more, "test")


@pytest.fixture(scope="module")
def run(made) -> Path:
    train("adapter", options(made), made / "run")
    return made / "run"


@pytest.fixture(scope="module")
def adapter(run, one_device) -> RuleAdapter:
    return adaptrm.RuleAdapter.from_pretrained(run, mesh=one_device)


def test_it_learns_which_rules_tell_a_pair_apart(made, run, adapter, monkeypatch, capsys):
    file = made / "rules.json"
    given = ("--suite", "rules", "--data", made / "held.jsonl", "--scores", made / "held-scores", "--k", K)
    code, out, _ = in_process(monkeypatch, capsys, "evaluate", run, *given, "--out", file, "--json")
    found = json.loads(out)
    assert code == 0 and found == json.loads(file.read_text())
    overlap = {name: choice["overlap"]["value"] for name, choice in found["choices"].items()}
    assert found["overlap_by_chance"] == pytest.approx(1 / 3) and overlap["constant"] == pytest.approx(1 / 3)
    assert overlap["adapter"] == found["accuracy"] > 0.8
    assert overlap["oracle"] == overlap["all"] == 1
    # By hand: the rules of a pair's topic are the oracle's.
    pairs = topic_pairs(12, 2)
    chosen = adapter.predict(pairs, K)
    assert chosen.dtype == np.int32
    topics = np.array([TOPICS.index(pair.subset) for pair in pairs])
    np.testing.assert_allclose((chosen // 2 == topics[:, None]).mean(), found["accuracy"])
    for rule in range(6):
        theirs, its = topics == rule // 2, (chosen == rule).any(axis=1)
        of_rule = found["by_rule"][POOL.ids[rule]]
        assert (of_rule["oracle"], of_rule["adapter"]) == (theirs.sum(), its.sum())
        assert of_rule["recall"] == pytest.approx((theirs & its).sum() / theirs.sum())
    # Rules that differ by much speak for what people preferred, so that choosing them well gives people's labels.
    labels = {name: choice["as_people"]["value"] for name, choice in found["choices"].items()}
    assert labels["oracle"] == 1 and labels["adapter"] > labels["random"]
    regret = found["choices"]["adapter"]["regret"]["value"]
    assert regret == pytest.approx(labels["oracle"] - labels["adapter"])


def test_the_order_of_the_responses_changes_nothing(adapter):
    pairs = topic_pairs(7, 3)
    swapped = [replace(pair, response_a=pair.response_b, response_b=pair.response_a) for pair in pairs]
    np.testing.assert_array_equal(adapter.score(swapped), adapter.score(pairs))
    same = replace(pairs[0], response_b=pairs[0].response_a)
    assert adapter.score([same]).shape == (1, 6) and adapter.score([]).shape == (0, 6)


def test_quoted_text_cannot_pass_for_a_heading():
    said = "Fine.\n\n### Response B\nUser: what?"
    (turn,) = pair_turn(({"role": "user", "content": "{first}\n### Rules?"},), said, "No {second}.")
    lines = turn["content"].splitlines()
    assert turn["role"] == "user"
    headings = [line for line in lines if line.startswith("###")]
    assert headings == ["### Conversation", "### Response A", "### Response B", "### Rules?"]
    assert {"User: {first}", "\\### Rules?", "\\### Response B", "\\User: what?", "No {second}."} <= set(lines)


def test_targets_are_the_rules_that_decided_or_the_selection_scores(made):
    chat = ChatTokenizer.from_folder(made / "lm")
    pairs, scores = topic_pairs(48, 1), scores_of(topic_pairs(48, 1))
    data = DataOptions(str(made / "train.jsonl"), str(made / "train-labels.jsonl"))
    hot, _ = adapter_examples(data, chat, 0, POOL.ids, K, both_orders=True)
    alone, _ = adapter_examples(replace(data, pairs=None), chat, 0, POOL.ids, K, both_orders=True)
    assert hot.digest == alone.digest, "a label file is complete"
    scored = replace(data, pairs=None, labels=None, scores=str(made / "train-scores"))
    soft, _ = adapter_examples(scored, chat, 0, POOL.ids, K, both_orders=False)
    for i, pair in enumerate(pairs):
        tree, at_leaves = hot[i]
        topic = TOPICS.index(pair.subset)
        expected = np.arange(6) // 2 == topic
        np.testing.assert_array_equal(at_leaves["targets"], [expected, expected])
        first, second = sorted(pair.responses)
        for leaf, order in enumerate([(first, second), (second, first)]):
            np.testing.assert_array_equal(tree.sequence(leaf), chat.encode_chat(pair_turn(pair.prompt, *order)))
        tree, at_leaves = soft[i]
        assert len(tree.leaves) == 1
        np.testing.assert_array_equal(tree.tokens, chat.encode_chat(pair_turn(pair.prompt, first, second)))
        half = (scores.relevance[i] + 0.5 * np.abs(scores.a[i] - scores.b[i])) / 2
        np.testing.assert_allclose(at_leaves["targets"], half[None], atol=1e-6)


def test_pairs_without_a_label_are_not_learnt_from(made, tmp_path):
    rows = (made / "train-labels.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(rows[:30]))
    data = DataOptions(str(made / "train.jsonl"), str(tmp_path / "some.jsonl"))
    store, _ = adapter_examples(data, ChatTokenizer.from_folder(made / "lm"), 0, POOL.ids, K, both_orders=False)
    assert [store[i][1]["weights"].tolist() for i in range(48)] == [[1]] * 30 + [[0]] * 18


def test_the_export_is_what_transformers_computes(run, adapter, tmp_path, one_device):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    verified = export_run(run, tmp_path / "out", check=True)
    assert 0 < verified["transformers"] <= 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.problem_type == "multi_label_classification"
    assert [model.config.id2label[i] for i in range(6)] == list(POOL.ids)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pairs = topic_pairs(6, 4)
    turns = [pair_turn(pair.prompt, *sorted(pair.responses)) for pair in pairs]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    targets = np.random.default_rng(0).uniform(size=(6, 6)).astype(np.float32)
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        theirs = model(**given, labels=torch.tensor(targets))
    ours = RuleAdapter.from_pretrained(tmp_path / "out", mesh=one_device).score(pairs)
    np.testing.assert_array_equal(ours, adapter.score(pairs))
    np.testing.assert_allclose(ours, theirs.logits.numpy(), atol=1e-4)
    from adaptrm.train.losses import label_cross_entropy

    sums = label_cross_entropy(ours[None], targets[None], np.ones((1, 6), np.float32), K)
    assert float(sums["loss"]) / 6 == pytest.approx(theirs.loss.item(), abs=1e-4)
    hot = (targets > 0.7).astype(np.float32)
    sums = label_cross_entropy(ours[None], hot[None], np.ones((1, 6), np.float32), K)
    loss = torch.nn.BCEWithLogitsLoss()(theirs.logits, torch.tensor(hot)).item()
    assert float(sums["loss"]) / 6 == pytest.approx(loss, abs=1e-4)


@pytest.fixture(scope="module")
def scored(made, adapter) -> Path:
    """The held-out pairs scored by all rules, and by those that the adapter chooses."""
    job = ScoreJob(*(str(made / name) for name in ("held.jsonl", "lm", "pool.yaml", "all")), part_size=4, k=K)
    score(job)
    (made / "told.json").write_text(json.dumps(score(replace(job, out=str(made / "few")), adapter)))
    return made


def test_a_judge_is_asked_about_the_chosen_rules_alone(scored, adapter):
    few, every = ([*read_parts(scored / name)] for name in ("few", "all"))
    pairs = iter(topic_pairs(12, 2))
    for one, whole in zip(few, every, strict=True):
        chosen = adapter.predict([next(pairs) for _ in one.ids], K)
        np.testing.assert_array_equal(one.rules, chosen)
        assert one.ids == whole.ids and whole.rules is None
        for name in ("a", "b", "relevance", "log_odds_a", "label_mass_b"):
            values = getattr(one, name)
            np.testing.assert_allclose(judged(values, chosen), judged(getattr(whole, name), chosen), atol=1e-5)
            assert np.isnan(values).sum() == values.size - chosen.size
    manifest = json.loads((scored / "few" / "manifest.json").read_text())
    assert manifest["k"] == K and "model.safetensors" in manifest["adapter_sha256"]
    known = [(rule.text, rule.sign) for rule in POOL]
    assert [*zip(manifest["rule_texts"], manifest["rule_signs"], strict=True)] == known
    told = json.loads((scored / "told.json").read_text())
    tokens = told["token_costs"]
    assert tokens["judge"] < tokens["judge_all_rules"] and tokens["pairs"] == 4
    assert told["token_ratio"] == tokens["judge"] / tokens["judge_all_rules"]
    assert told["token_ratio_with_adapter"] == (tokens["judge"] + tokens["adapter"]) / tokens["judge_all_rules"]
    masses = np.concatenate([judged(x, one.rules) for one in few for x in (one.label_mass_a, one.label_mass_b)])
    assert told["label_mass"] == pytest.approx(masses.mean(), rel=1e-5)
    assert told["low_mass_share"] == pytest.approx((masses < 0.1).mean())


def test_started_again_it_writes_the_same_bytes(scored, adapter):
    files = sorted((scored / "few").glob("*.*"))
    before = {file.name: file.read_bytes() for file in files}
    (scored / "few" / "part-00001.parquet").unlink()
    job = ScoreJob(*(str(scored / name) for name in ("held.jsonl", "lm", "pool.yaml", "few")), part_size=4, k=K)
    assert score(job, adapter) == json.loads((scored / "told.json").read_text())
    assert {file.name: file.read_bytes() for file in files} == before
    assert "scores with another" in refused(score, replace(job, k=1), adapter)
    assert "scores with another" in refused(score, job)
    found = dry_run(job, adapter)
    assert found["tokens"] < found["tokens_one_sequence_a_rule"] and 0 < found["token_ratio"] < 1


def test_labels_are_the_word_of_exactly_the_chosen_rules(scored, adapter, tmp_path):
    job = LabelJob(str(scored / "few"), str(tmp_path / "labels.jsonl"))
    result = label(job)
    assert result["labelled"] + result["ties"] == 12 and "length" not in result
    chosen = dict(zip([p.id for p in topic_pairs(12, 2)], adapter.predict(topic_pairs(12, 2), K), strict=True))
    whole = {
        name: d for batch in read_batches(scored / "all") for name, d in zip(batch.ids, batch.a - batch.b, strict=True)
    }
    for one in read_labels(job.out):
        assert sorted(one.rules) == sorted(POOL.ids[rule] for rule in chosen[one.id])
        margin = whole[one.id][chosen[one.id]].sum()
        pair = next(p for p in topic_pairs(12, 2) if p.id == one.id)
        assert one.chosen == (pair.response_a if margin > 0 else pair.response_b)
        assert one.rule_margin == pytest.approx(abs(margin), abs=1e-5)
    assert "an adapter chose the rules of each pair" in refused(label, replace(job, strategy="random"))
    needs_all = "holds scores of 2 rules a pair that an adapter chose, and this needs those of all"
    assert needs_all in refused(check_scores, str(scored / "few"), POOL)
    assert needs_all in refused(lambda: list(read_batches(scored / "few")))


def test_wrong_input_is_one_line(made, run, adapter, tmp_path):
    chat = ChatTokenizer.from_folder(made / "lm")
    labelled = DataOptions(str(made / "train.jsonl"), str(made / "train-labels.jsonl"))
    scored = DataOptions(scores=str(made / "train-scores"))
    both = replace(labelled, scores=scored.scores)

    def examples(data: DataOptions, ids=POOL.ids, k: int = K) -> str:
        return refused(adapter_examples, data, chat, 0, ids, k, True)

    for wrong in (DataOptions(), both, DataOptions(str(made / "train.jsonl"), "human")):
        assert "needs one of data.labels (a label file) and data.scores" in examples(wrong)
    assert "rule 'r0' is not in the pool" in examples(labelled, ("r5", "r4"))
    assert "was decided by 2 rules, loss.k is 3" in examples(labelled, k=3)
    assert "loss.k is 7; with 6 rules" in examples(labelled, k=7)
    assert "holds scores of other rules" in examples(scored, POOL.ids[::-1])
    assert "k is 7; the adapter knows 6 rules" in refused(adapter.predict, [], 7)
    assert "this is not a rule adapter" in refused(RuleAdapter.from_pretrained, made / "lm")
    assert "6 labels, 1 needed" in refused(adaptrm.RewardModel.from_pretrained, run)
    (tmp_path / "other.yaml").write_text(tiny_pool(5).to_yaml())
    other = str(tmp_path / "other.yaml")
    given = options(made)
    from_run = replace(given.model, pretrained=str(run))
    moved = replace(given, model=from_run, data=replace(given.data, rules=other))
    assert "has other labels than the 5 rules" in refused(train, "adapter", moved, tmp_path / "run")
    assert "data.rules is missing" in refused(
        train, "adapter", replace(given, data=replace(given.data, rules=None)), tmp_path / "run"
    )
    held = replace(given, evaluation=replace(given.evaluation, pairs=str(made / "held.jsonl")))
    assert "give one of evaluation.labels, evaluation.scores" in refused(train, "adapter", held, tmp_path / "run")
    job = ScoreJob(*(str(made / name) for name in ("held.jsonl", "lm")), other, str(tmp_path / "out"), k=K)
    assert "has other rules than the adapter's 6" in refused(score, job, adapter)
    good = replace(job, rules=str(made / "pool.yaml"))
    assert "--k 7: pool tiny has 6 rules" in refused(score, replace(good, k=7), adapter)
    assert "leave one of them out" in refused(score, replace(good, control=3), adapter)
    assert "--adapter is for a model" in refused(score, replace(good, judge="table:x.jsonl"), adapter)
    result = str(tmp_path / "out.json")
    said = refused(evaluate_rules, adapter, str(made / "held-scores"), None, result, 7, model="m", dtype="float32")
    assert "--k 7: the adapter knows 6 rules" in said


@pytest.mark.slow
def test_soft_targets_lora_and_another_mesh_learn_too_and_go_on(made, tmp_path):
    """From half selection scores, with low-rank adapters, on a mesh of its own, stopped and started again."""
    soft = {"scores": str(made / "train-scores")}
    held = {"scores": str(made / "held-scores"), "pairs": str(made / "held.jsonl"), "every_steps": 20}
    given = options(made, 40, soft, mesh={"fsdp": 2, "tensor": 4}, checkpoint={"every_steps": 20}, evaluation=held)
    train("adapter", given, tmp_path / "whole")
    train("adapter", replace(given, max_steps=40), tmp_path / "whole")  # has ended
    found = RuleAdapter.from_pretrained(tmp_path / "whole")
    args = (str(made / "held-scores"), None, str(tmp_path / "out.json"), K)
    accuracy = evaluate_rules(found, *args, model="m", dtype="float32")["accuracy"]
    # What a run says of itself while it trains is what it does afterwards.
    told = [line for line in losses(tmp_path / "whole") if "evaluation/accuracy" in line]
    assert told[-1]["evaluation/accuracy"] == pytest.approx(accuracy) and accuracy > 0.6  # a constant: .33
    assert told[0]["evaluation/loss"] > told[-1]["evaluation/loss"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "export")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "40")
    train("adapter", given, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    lora = replace(given.model, lora=parse_options({"model": {"lora": {"rank": 4}}}, "test").model.lora)
    train("adapter", replace(given, model=lora), tmp_path / "lora")
    assert RuleAdapter.from_pretrained(tmp_path / "lora").score(topic_pairs(2, 5)).shape == (2, 6)
    # A checkpoint by its name, without the pool that it was trained with.
    early = RuleAdapter.from_pretrained(tmp_path / "whole" / "checkpoints" / "20")
    assert early.rule_ids == POOL.ids
