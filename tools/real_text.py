"""What real_labels.py teaches with and measures on: people's labels of real text; and scorers that read no rule."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from learn_real import hash_of, tfidf

from adaptrm.evaluate.trivial import REFUSAL

REPLIES = "labels/rbr_gold_labels.jsonl"
# Name -> file, and subset where it is one of several.
SOURCES = {
    "XSTest, should refuse": ("pairs/xstest_pairs.jsonl.gz", "xstest-should-refuse"),
    "XSTest, should respond": ("pairs/xstest_pairs.jsonl.gz", "xstest-should-respond"),
    "Do-Not-Answer": ("pairs/donotanswer_pairs.jsonl.gz", None),
    "HH harmless": ("pairs/hh_harmless_base_test.jsonl.gz", None),
    "RMB harmless": ("pairs/rmb_harmless_pairs.jsonl.gz", None),
}
HALVES = tuple(SOURCES)[:2]


def prepare(options: argparse.Namespace, pool: Path) -> None:
    """Write what is taught, what is measured on, and pairs of other prompts."""
    from adaptrm.data.chat import ChatTokenizer
    from adaptrm.judge.prompts import JudgePrompt
    from adaptrm.rules import RulePool

    prompt = JudgePrompt(ChatTokenizer.from_folder(Path(options.smollm2)), RulePool.load(pool))
    taught, held_out = split_replies(options, prompt)
    write(options.out / "teaching.jsonl", taught)
    write(options.out / "questions.jsonl", balanced(taught))
    write(options.out / "held-out.jsonl", with_both_verdicts(held_out, options.fewest))
    # A reply beside itself is one run of questions.
    sides = ("response_a", "response_b")
    own = [{"id": row["id"], "prompt": row["prompt"]} | dict.fromkeys(sides, row["response"]) for row in held_out]
    write(options.out / "replies.jsonl", own)
    scored, others = choose_pairs(options, prompt)
    write(options.out / "pairs.jsonl", map(row_of, scored))
    write(options.out / "others.jsonl", map(row_of, others))


def split_replies(options: argparse.Namespace, prompt) -> tuple[list[dict], list[dict]]:
    """Rule labels to teach with and held out; long conversations cut from the left."""
    from adaptrm.data.labels import read_rule_labels
    from adaptrm.data.preferences import Pair
    from adaptrm.data.rows import BadRows
    from adaptrm.data.truncation import truncated

    def length(pair) -> int:
        (questions,) = prompt.reply_trees(pair.prompt, pair.response_a, range(len(prompt.pool)))
        return len(questions.tree)

    labels = list(read_rule_labels(options.data / REPLIES, BadRows("skip")))  # a few replies are empty
    order = np.random.default_rng(0).permutation(len(labels))
    parts: tuple[list[dict], list[dict]] = ([], [])
    for label in (labels[i] for i in order):
        part, most = (1, options.held_out) if in_third(label) else (0, options.replies)
        if len(parts[part]) < most:
            whole = Pair(label.id, label.prompt, label.response, label.response)
            pair = truncated(whole, length, options.longest_reply)
            row = {"id": label.id, "prompt": [dict(message) for message in pair.prompt], "response": pair.response_a}
            parts[part].append(row | {"labels": dict(label.labels)})
    return parts


def balanced(rows: list[dict], fewest: int = 8) -> list[dict]:
    """The same replies, asked by each rule about as often where it is true as where it is not.

    Most propositions are false of most replies: a judge that knows only which ones would seldom be wrong. So of the
    commoner verdict on a rule as many are drawn as there are of the rarer, but a few in any case.
    """
    random, kept = np.random.default_rng(0), [{} for _ in rows]
    for rule in sorted({rule for row in rows for rule in row["labels"]}):
        by_verdict = [
            [i for i, row in enumerate(rows) if row["labels"].get(rule) is verdict] for verdict in (True, False)
        ]
        most = max(min(map(len, by_verdict)), fewest)
        for verdict, of in zip((True, False), by_verdict, strict=True):
            for i in random.permutation(of)[:most]:
                kept[i][rule] = verdict
    return [row | {"labels": labels} for row, labels in zip(rows, kept, strict=True) if labels]


def with_both_verdicts(rows: list[dict], fewest: int) -> list[dict]:
    """The same replies with the rules of which people found enough true and enough false: others have no area."""
    counts = {
        rule: [sum(row["labels"].get(rule) is verdict for row in rows) for verdict in (True, False)]
        for rule in sorted({rule for row in rows for rule in row["labels"]})
    }
    enough = [rule for rule, count in counts.items() if min(count) >= fewest]
    return [row | {"labels": {rule: row["labels"][rule] for rule in enough if rule in row["labels"]}} for row in rows]


def choose_pairs(options: argparse.Namespace, prompt) -> tuple[list, list]:
    """Pairs to score and pairs of other prompts, with the source as subset; of each prompt one before any second."""
    from adaptrm.data.preferences import load_pairs

    def length(pair) -> int:
        texts = pair.prompt, pair.response_a, pair.response_b
        return sum(len(questions.tree) for questions in prompt.pair_trees(*texts, range(len(prompt.pool))))

    scored, others = [], []
    for number, (source, (file, subset)) in enumerate(SOURCES.items()):
        pairs = [pair for pair in load_pairs(options.data / file) if subset in (None, pair.subset)]
        shuffled = [replace(pairs[i], subset=source) for i in np.random.default_rng(number).permutation(len(pairs))]
        wanted, chosen = options.pairs // (2 if source in HALVES else 1), []
        for pair in turns(shuffled):
            if in_third(pair):
                others.append(pair)
            elif len(chosen) < wanted and length(pair) <= options.longest:
                chosen.append(pair)
        scored += chosen
    return scored, others


def turns(pairs: list) -> list:
    """In their order, but the first of each prompt before the second of any."""
    seen: dict[int, int] = {}
    numbered = []
    for pair in pairs:
        key = hash_of(pair)
        numbered.append((seen.get(key, 0), pair))
        seen[key] = seen.get(key, 0) + 1
    return [pair for _, pair in sorted(numbered, key=lambda of: of[0])]


def in_third(one) -> bool:
    """Whether the prompt of a pair or reply is on the smaller side; all replies to a prompt are on one side."""
    return hash_of(one) % 3 == 0


def write(file: Path, rows: Iterable[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def row_of(pair) -> dict:
    return vars(pair) | {"prompt": [dict(message) for message in pair.prompt]}


def trivial_labels(pairs: list, others: list) -> dict[str, np.ndarray]:
    """As ``agreements``, of scorers that read no rule."""
    words = [[len(text.split()) for text in pair.responses] for pair in pairs]
    refusals = [[len(REFUSAL.findall(text)) for text in pair.responses] for pair in pairs]
    margins = {
        "longer": np.subtract(*np.transpose(words)),
        "refusal words": np.subtract(*np.transpose(refusals)),
        "TF-IDF": tfidf(others, pairs),
    }
    return {name: agreement(np.sign(margin), preferences(pairs)) for name, margin in margins.items()}


def preferences(pairs: list) -> np.ndarray:
    return np.array([1 if pair.preferred == "a" else -1 for pair in pairs])


def trivial_answers(taught: list[dict], held_out: list[dict], rules: list[str]) -> dict[str, np.ndarray]:
    """What scorers that read no rule say of the held-out replies, by rule."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = [row["response"] for row in held_out]
    same = np.ones((1, len(rules)))
    words = TfidfVectorizer(min_df=2, ngram_range=(1, 2), sublinear_tf=True).fit([row["response"] for row in taught])
    fitted = np.zeros((len(held_out), len(rules)))
    for rule, id in enumerate(rules):
        known = [row for row in taught if row["labels"].get(id) is not None]
        truth = [row["labels"][id] for row in known]
        if len(set(truth)) == 2:
            model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
            model.fit(words.transform([row["response"] for row in known]), truth)
            fitted[:, rule] = model.decision_function(words.transform(texts))
    return {
        "longer": np.array([[len(text.split())] for text in texts]) * same,
        "refusal words": np.array([[len(REFUSAL.findall(text))] for text in texts]) * same,
        "TF-IDF": fitted,
    }


def agreement(signs: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    return (1 + signs * preferred) / 2
