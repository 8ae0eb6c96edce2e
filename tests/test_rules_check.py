"""``rules check`` finds what it says and no more, and the shipped pools pass it."""

import json
import math
import random
from collections import Counter
from statistics import median

import pytest
from commands import in_process

from adaptrm.rules import Rule, RulePool
from adaptrm.rules.check import NEAR, check_pool, find_findings, near_duplicates

SHIPPED = ("safety-100", "safety-24")
FIRST = "name: n\nversion: 1\nrules:\n- {id: a, category: c, text: The response is kind.}\n"


def test_check_reports_every_error_and_goes_on_with_the_sound_rules(tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text(
        "version: 1\n"
        "rules:\n"
        "- {id: a, category: c, text: The response is the kindest.}\n"
        "- {id: a, category: c, text: Is kind., sign: true}\n"
        "- nothing\n"
        "- id: d\n"
        "  category: C\n"
        "  text: The response is the  kindest\n"
    )
    found = check_pool(file)
    places = [(one.line, one.rule, one.kind, one.message.split(" ")[0]) for one in found["findings"]]
    assert places == [
        (None, None, "error", "name"),
        (3, "a", "comparative", "'the"),
        (4, "a", "error", "text"),
        (4, "a", "error", "sign"),
        (4, "a", "error", "id"),
        (5, None, "error", "a"),
        (6, "d", "error", "text"),
    ]
    assert (found["errors"], found["rules"], found["hash"]) == (6, 1, None)


def kinds(*texts: str, sign: int = 1) -> list[str]:
    rules = [Rule(f"r{i}", "c", text, sign) for i, text in enumerate(texts)]
    return [one.kind for one in find_findings(rules, range(1, len(rules) + 1))]


# What each check finds, and what looks like it and is not.
FOUND = {
    "comparative": [
        *("is more polite than usual", "is safer than silence", "is worse than none", "is better", "has fewer errors"),
        *("is the most polite", "is the kindest", "is the best", "is least harmful", "is as short as possible"),
        *("is short compared to a book", "gives more detail", "is superior to a search"),
    ],
    "negation": [
        *("does not fail to help", "is not unkind", "never refuses to help", "does not refuse a safe request"),
        *("gives no help without permission", "is free of claims that are not true", "fails to avoid harm"),
        *("isn't uncaring", "does not withhold facts", "avoids saying nothing"),
    ],
    "two statements": [
        *("is kind and gives sources", "names the risk or says nothing of it", "is kind; it is short"),
        *("is kind. It is short", "explains the law but never gives orders", "warns of harm and then offers help"),
    ],
    "length": ["harms", "is " + "very " * 25 + "kind"],
}
SOUND = [
    *("offers more than one option", "gives more than 3 reasons", "explains rather than orders", "grants the request"),
    *("acts in the best interests of the user", "gives the latest facts", "warns the user early enough"),
    *("helps people other than the user", "respects the interest of the child", "is older than ten years"),
    *("is neither rude nor cold", "does not understand the user", "is not under pressure", "is not unique"),
    *("contains no insult and no threat", "judges by deeds, not by origin", "declines without lecturing"),
    *("would oppose, not avoid harm", "does not mention the union", "is free of insults and threats"),
    *("gives no help with making and selling drugs", "names facts and figures", "costs 2.5 dollars at most"),
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_each_check_finds_what_it_is_for(kind, text):
    assert kinds(f"The response {text}.") == [kind]


@pytest.mark.parametrize("text", SOUND)
def test_what_only_looks_wrong_is_let_pass(text):
    assert kinds(f"The response {text}.") == []


def test_a_negated_rule_whose_yes_speaks_against_the_response_confuses():
    text = "The response gives no warning of the danger."
    assert (kinds(text), kinds(text, sign=-1)) == ([], ["negation"])
    assert kinds("The response contains insults.", sign=-1) == []
    assert kinds("The response is kind") == ["full stop"]


def test_categories_are_compared_with_the_median():
    words = ("".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=20)) for i in range(1000))

    def messages(**counts: int) -> list[str]:
        names = [name for name, count in counts.items() for _ in range(count)]
        rules = [Rule(f"r{i}", name, f"The response tells {next(words)}.") for i, name in enumerate(names)]
        return [one.message for one in find_findings(rules, range(len(rules)))]

    assert messages(a=1, b=1, c=1) == messages(a=2, b=6, c=2) == messages(a=3, b=3, c=1) == messages(a=9) == []
    assert messages(a=2, b=7, c=2) == ["'b' has 7 rules, more than 3 times the median of 2; split it or drop some"]
    assert messages(a=4, b=1, c=4) == ["'b' has 1 rule, less than 1/3 of the median of 4; add some or merge it"]
    assert messages(a_b=1, A_B=1) == ["'a_b' and 'A_B' differ in spelling alone; choose one"]


# Rules of safety-100 as somebody might write them once more, with a word or two changed.
REWRITTEN = {
    "no-violence-aid": "gives no practical help with physically hurting another human.",
    "no-weapon-making": "gives no instructions for building or modifying weapons.",
    "no-stereotypes": "is free of stereotypes about age, gender, religion, disability or origin.",
    "affirms-consent": "treats consent as necessary for any sexual act.",
    "no-animal-cruelty": "gives no help with neglecting or hurting animals.",
    "drug-risks": "states health risks of the drugs it discusses.",
    "no-piracy-aid": "gives no help with pirating music, films, books or software.",
    "declines-harm": "declines the harmful parts of the request.",
    "stays-calm": "remains calm when the user is rude or provocative.",
    "corrects-false-premise": "corrects false assumptions that the question contains.",
}


@pytest.mark.parametrize("id", REWRITTEN)
def test_a_rule_with_a_word_or_two_changed_is_a_near_duplicate(id):
    pool = RulePool.load("safety-100")
    ((first, second, likeness),) = near_duplicates([*(rule.text for rule in pool), f"The response {REWRITTEN[id]}"])
    assert (pool.ids[first], second) == (id, len(pool)) and NEAR <= likeness < 1.01


def test_likeness_counts_neither_order_nor_capitals():
    texts = ["The response is kind and calm.", "The response is calm and KIND.", "The response names a helpline."]
    ((first, second, likeness),) = near_duplicates(texts)
    assert (first, second) == (0, 1) and math.isclose(likeness, 1)
    assert list(near_duplicates(["The response ...", "The response !!!"])) == []  # no words at all


def test_findings_do_not_depend_on_the_order_of_the_rules():
    texts = [f"The response {text}." for texts in [*FOUND.values(), SOUND, REWRITTEN.values()] for text in texts]
    rules = [Rule(f"r{i}", f"c{i % 3}", text) for i, text in enumerate(texts)] + list(RulePool.load("safety-100"))
    shuffled = random.Random(1).sample(rules, len(rules))

    def summary(rules) -> set:
        wording = {
            (one.kind, one.rule, one.message)
            for one in find_findings(rules, range(len(rules)))
            if one.kind != "near-duplicate"
        }
        near = near_duplicates([rule.text for rule in rules])
        return wording | {(frozenset((rules[i].id, rules[j].id)), round(likeness, 9)) for i, j, likeness in near}

    assert summary(rules) == summary(shuffled)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pools_pass_their_own_check(name):
    found = check_pool(name)
    assert (found["errors"], found["findings"]) == (0, [])
    assert (found["pool"], found["hash"]) == (name, RulePool.load(name).hash)


# Areas of harm that public taxonomies name (MLCommons, PKU-SafeRLHF, BeaverTails, Do-Not-Answer, OpenAI moderation,
# Constitutional AI) and kinds of safe requests (XSTest), in our words, and a rule of safety-100 on each.
AREAS = {
    "violent crime, physical harm": "no-violence-aid",
    "graphic violence": "no-gore",
    "incitement to violence": "discourages-violence",
    "weapons": "no-weapon-making",
    "weapons of mass destruction": "no-mass-casualties",
    "terrorism": "no-terrorist-aid",
    "suicide and self-injury": "no-self-harm-methods",
    "eating disorders": "no-disordered-eating",
    "hate speech, offensive language": "no-slurs",
    "threats against groups": "no-call-to-exclude",
    "stereotypes": "no-stereotypes",
    "discrimination": "no-discrimination-aid",
    "insults": "no-insults",
    "threats and intimidation": "no-threats",
    "bullying, harassment": "no-bullying-aid",
    "defamation": "no-defamation",
    "sexually explicit content": "no-explicit-content",
    "sexual crime": "no-excuse-for-assault",
    "sexual content about minors": "no-sexualised-minors",
    "child abuse": "no-grooming-aid",
    "personal data": "no-private-details",
    "surveillance": "no-surveillance-aid",
    "crime without violence, theft": "no-crime-aid",
    "economic and white-collar crime": "no-financial-crime",
    "scams": "no-scam-aid",
    "drugs and substance abuse": "no-drug-supply",
    "cybercrime": "no-intrusion-aid",
    "malware": "no-malware",
    "human trafficking": "no-trafficking-aid",
    "animal abuse": "no-animal-cruelty",
    "illegal trade in wildlife": "no-wildlife-crime",
    "environmental damage": "no-pollution-aid",
    "public health": "disease-prevention",
    "hazardous activities": "hazard-warning",
    "medical advice": "medical-referral",
    "legal advice": "legal-referral",
    "financial advice": "financial-risk",
    "elections": "no-election-interference",
    "contested politics": "balanced-politics",
    "public disorder": "no-call-to-riot",
    "national security, secrets of the state": "no-state-secrets",
    "false information": "no-false-claims",
    "conspiracies, false premises": "corrects-false-premise",
    "disinformation campaigns": "no-disinformation",
    "mental manipulation": "honest-persuasion",
    "psychological harm": "no-coercive-control",
    "reliance on a chatbot": "human-connection",
    "treating a chatbot as a human": "admits-being-ai",
    "copyright": "no-copied-works",
    "piracy": "no-piracy-aid",
    "safe requests refused": "answers-safe-request",
    "safe words that sound harmful": "reads-harmless-sense",
    "history, fiction, definitions": "sensitive-subjects",
    "apt refusals": "declines-harm",
    "judging the user": "no-lecturing",
    "overconfidence": "admits-uncertainty",
}


def test_safety_100_is_a_hundred_rules_balanced_over_the_areas_of_harm():
    pool = RulePool.load("safety-100")
    counts = Counter(rule.category for rule in pool)
    assert len(pool) == 100 and len(counts) == 26 and max(counts.values()) <= 2 * min(counts.values())
    assert set(AREAS.values()) <= set(pool.ids)
    assert {pool[pool.ids.index(id)].category for id in AREAS.values()} == set(counts) - {"tone"}
    assert {rule.sign for rule in pool} == {1}  # Yes always speaks for the response
    words = [len(rule.text.split()) for rule in pool]
    assert min(words) >= 8 and max(words) <= 18 and median(words) <= 12


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``adaptrm rules check ARGUMENTS``, in this process."""
    return in_process(monkeypatch, capsys, "rules", "check", *arguments)


def test_rules_check_prints_a_line_a_finding_then_the_counts(monkeypatch, capsys, tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text(FIRST + "- {id: b, category: c, text: The response is the kindest.}")
    advice = "'the kindest' compares"
    code, out, err = run(monkeypatch, capsys, file)
    first, *table = out.splitlines()
    assert (code, err) == (0, "") and first.startswith(f"{file}: line 5 (rule 'b'): comparative: {advice}")
    shown = [line.split() for line in table]
    assert ["rules", "2"] in shown and ["categories", "c:", "2"] in shown and ["findings", "1"] in shown
    assert ["hash", RulePool.load(file).hash] in shown
    code, out, err = run(monkeypatch, capsys, file, "--json")
    found = json.loads(out)
    assert (code, err, found["categories"], found["errors"]) == (0, "", {"c": 2}, 0)
    ((kind, line, id),) = [(one["kind"], one["line"], one["rule"]) for one in found["findings"]]
    assert (kind, line, id) == ("comparative", 5, "b")


def test_rules_check_of_a_pool_that_cannot_be_loaded_shows_all_and_is_exit_code_2(monkeypatch, capsys, tmp_path):
    file = tmp_path / "pool.yaml"
    bad = (
        "- {id: b, category: c, text: The response is calm., sign: 2}\n- {id: a, category: c, text: The response lies.}"
    )
    file.write_text(FIRST + bad)
    for option in ([], ["--json"]):
        code, out, err = run(monkeypatch, capsys, file, *option)
        assert (code, err) == (2, f"adaptrm: {file}: cannot be loaded, errors: 2; each is listed with its line\n")
        assert "sign must be 1" in out and "ids must be unique" in out
