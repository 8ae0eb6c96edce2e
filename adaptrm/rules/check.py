"""``adaptrm rules check``: what a careful reader would change in a rule pool.

Every check is a pattern that is meant to be right nearly always, not to find everything: two rules that say the same
in other words pass. Findings are advice and keep no pool from being loaded; errors do (``pool_file.py``).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from adaptrm.rules.pool import RulePool, read_text
from adaptrm.rules.pool_file import Finding, read_rules
from adaptrm.rules.rule import BEGINNING, Rule

# Cosine of two rules. The closest different rules: .43 in safety-100, .52 in safety-24, .64 in a pool of short rules
# about advice; of 26 rules of safety-100 with a word or two changed, 24 reach .72 or more with their original.
NEAR = 0.7
WORDS = (4, 25)  # "The response" included; a statement of other length is vague, or several statements
UNBALANCED = 3  # times the median number of rules a category, or one in so many

# "More than one" compares with a number, not with another response.
COUNTED = r"(?! than (?:one|two|three|four|five|ten|\w+teen|half|an?|\d+)\b)"
NO_SUPERLATIVE = r"(?!(?:request|interest|test|rest|guest|contest|protest|forest|arrest|harvest|quest|west|latest)\b)"
COMPARATIVE = re.compile(
    rf"\b(?:more|less|fewer)\b{COUNTED}(?: \w+){{0,2}} than\b"
    rf"|\b(?!(?:rather|other|whether|either|neither|never|ever)\b)\w+er\b{COUNTED} than\b|\bworse than\b"
    rf"|\b(?:is|are|has|gives|shows|offers|sounds|seems|uses|contains) (?:more|less|fewer|better|worse)\b{COUNTED}"
    rf"|\bthe (?!best interests?\b)(?:most|least|worst|{NO_SUPERLATIVE}\w+est)\b|\bis (?:most|least|best)\b"
    r"|\bcompared (?:to|with)\b|\bin comparison\b|\bsuperior to\b|\binferior to\b|\bas \w+ as possible\b",
    re.IGNORECASE,
)
NOT = r"(?:(?<!, )\bnot\b|\bnever\b|\bcannot\b|n['’]t\b)"  # ", not" contrasts: "by what they do, not by who they are"
NEGATION = rf"(?:{NOT}|\b(?:no|nobody|nothing|none|neither|without)\b)"
AVOID = r"(?:avoid|fail|lack|refrain)\w*"
UN_WORD = r"un(?!der|til|less|it|i[oqv]|cle)\w+"
DOUBLE_NEGATION = re.compile(
    rf"{NEGATION}.*(?<!, )(?<!and )(?<!or ){NEGATION}|\b(?:{AVOID}|free of)\b.*{NEGATION}|\b{AVOID} .*\b{AVOID}"
    rf"|{NOT} (?:\w+ ){{0,2}}(?:{AVOID}|{UN_WORD}|(?:refus|declin|withh[eo]ld|omit|neglect)\w*)",
    re.IGNORECASE,
)
# Verbs that are no nouns too, so that "insults and threats" is one statement.
VERB = (
    "is|are|has|does|gives|says|tells|explains|describes|provides|contains|declines|refuses|avoids|admits|includes|"
    "offers|helps|treats|speaks|encourages|discourages|recommends|suggests|mentions|acknowledges|respects|corrects|keeps|makes"
)
TWO_STATEMENTS = re.compile(rf"\b(?:and|or|but)(?: (?:also|then|never|not|it))* (?:{VERB})\b|;|[.!?] \w", re.IGNORECASE)


def check_pool(pool: str | os.PathLike) -> dict[str, Any]:
    """All errors and findings of a pool, in the order of its file; what is about the categories comes last.

    Returns:
        Name, version, number of rules without an error, hash (None with errors), rules by category, number of errors,
        and the ``Finding``s; those of kind ``error`` keep the pool from being loaded.

    Raises:
        InputError: no such pool, or it is not YAML of the form of a pool.
    """
    found = read_rules(read_text(pool), str(pool))
    findings = [*found.errors, *find_findings(found.rules, found.lines)]
    findings.sort(key=lambda one: one.line or (0 if one.kind == "error" else math.inf))  # advice on the whole last
    return {
        "pool": found.name,
        "version": found.version,
        "rules": len(found.rules),
        "hash": None if found.errors else RulePool(found.name, found.version, tuple(found.rules)).hash,
        "categories": dict(Counter(rule.category for rule in found.rules)),
        "errors": len(found.errors),
        "findings": findings,
    }


def find_findings(rules: Sequence[Rule], lines: Sequence[int]) -> list[Finding]:
    """What deserves a second look in rules that stand in these lines of a file."""
    findings = [
        Finding(kind, message, line, rule.id)
        for rule, line in zip(rules, lines, strict=True)
        for kind, message in _wording(rule)
    ]
    for first, second, likeness in near_duplicates([rule.text for rule in rules]):
        message = f"says nearly what line {lines[first]} (rule {rules[first].id!r}) says (likeness {likeness:.2f})"
        findings.append(Finding("near-duplicate", f"{message}; keep one", lines[second], rules[second].id))
    return findings + [Finding("category", message) for message in _categories(rules)]


def _wording(rule: Rule) -> Iterator[tuple[str, str]]:
    text = rule.text
    if match := COMPARATIVE.search(text):
        yield "comparative", f"{match[0]!r} compares, but a judge sees one response; say what it does by itself"
    if match := DOUBLE_NEGATION.search(text):
        yield "negation", f"{match[0]!r} negates twice; say it positively"
    elif rule.sign < 0 and (match := re.search(NEGATION, text, re.IGNORECASE)):
        yield "negation", f"{match[0]!r} negates, and sign -1 turns Yes round again; say it positively, with sign 1"
    if match := TWO_STATEMENTS.search(text.rstrip(" .!?")):
        yield "two statements", f"{match[0]!r} joins two statements, and one answer cannot be given to both; split it"
    if not WORDS[0] <= (count := len(text.split())) <= WORDS[1]:
        yield "length", f"has {count} words; {WORDS[0]} to {WORDS[1]} are easily judged"
    if not text.endswith("."):
        yield "full stop", "does not end with a full stop, as the other sentences of the judge's prompt do"


def near_duplicates(texts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Positions and likeness of every two texts that differ by a word or two.

    Likeness is the cosine of TF-IDF vectors over the four-letter pieces of words: endings count little (lie, lies),
    what many rules share (gives no help with) counts less than what sets a rule apart, and order counts nothing.
    """
    pieces = [_pieces(text) for text in texts]
    documents = Counter(piece for found in pieces for piece in found)
    vectors = []
    for found in pieces:
        vector = {p: n * (math.log((1 + len(texts)) / (1 + documents[p])) + 1) for p, n in found.items()}
        size = math.sqrt(sum(value * value for value in vector.values()))
        vectors.append({piece: value / size for piece, value in vector.items()})
    for second, vector in enumerate(vectors):
        for first in range(second):
            likeness = sum(value * vectors[first].get(piece, 0.0) for piece, value in vector.items())
            if likeness >= NEAR:
                yield first, second, likeness


def _pieces(text: str) -> Counter[str]:
    words = [f" {word} " for word in re.findall(r"\w+", text.casefold().removeprefix(BEGINNING.casefold()))]
    return Counter(word[i : i + 4] for word in words for i in range(max(1, len(word) - 3))) or Counter([text])


def _categories(rules: Sequence[Rule]) -> Iterator[str]:
    counts = Counter(rule.category for rule in rules)
    middle = median(counts.values()) if counts else 0
    for category, count in counts.items():
        rules_of = f"{category!r} has {count} {'rule' if count == 1 else 'rules'}"
        if count > UNBALANCED * middle:
            yield f"{rules_of}, more than {UNBALANCED} times the median of {middle:g}; split it or drop some"
        if count * UNBALANCED < middle:
            yield f"{rules_of}, less than 1/{UNBALANCED} of the median of {middle:g}; add some or merge it"
    spellings: dict[str, str] = {}
    for category in counts:
        first = spellings.setdefault(re.sub(r"[\W_]+", " ", category.casefold()), category)
        if first != category:
            yield f"{first!r} and {category!r} differ in spelling alone; choose one"
