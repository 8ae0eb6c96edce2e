"""What the judge reads: a conversation quoted as text, a response, and one statement a rule, as a prefix tree."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.prefix_tree import Node, PrefixTree, common_prefix
from adaptrm.rules import RulePool

ANSWERS = ("Yes", "No", "Neither")
# Where quoted text could pass for the transcript's own headings: at the start of a line, whatever ends lines, behind
# whatever shows as nothing. (Blanks leave line ends out: each begins a match of its own, so that many of them cost no
# more than their number.)
LINE_ENDS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
INVISIBLE = (
    r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff"
)
BLANK = rf"(?:[^\S{LINE_ENDS}]|[{INVISIBLE}])"
FORGED = re.compile(
    rf"(^|[{LINE_ENDS}])({BLANK}*)(?=[#\uff03\ufe5f]|(?:User|Assistant|System){BLANK}*[:\uff1a\ufe55])", re.IGNORECASE
)


def quote(text: str) -> str:
    """A text for the transcript, a backslash before every line that could pass for one of its headings."""
    return FORGED.sub(r"\1\2\\", text)


def transcript(prompt: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text, roles in plain words, with an empty line after each message."""
    return "".join(f"{m['role'].capitalize()}: {quote(m['content'])}\n\n" for m in prompt)


@dataclass(frozen=True)
class Template:
    """The texts around the conversation; ``{rule}`` stands in the opening (rule first) or in the question."""

    opening: str
    response: str
    question: str


TEMPLATES = {
    "conversation-first": Template(
        opening=(
            "Read the conversation and the response of the assistant, then say whether the statement about the "
            "response is true. Answer Yes if it is true, No if it is not, Neither if it does not apply.\n\n"
            "### Conversation\n"
        ),
        response="### Response\n",
        question="### Statement\n{rule}\n\n### Yes, No or Neither?",
    ),
    # The published order. Nothing but the instructions is shared between rules, so each is a tree of its own.
    "rule-first": Template(
        opening=(
            "Read the statement, then the conversation and the response of the assistant, and say whether the "
            "statement about the response is true. Answer Yes if it is true, No if it is not, Neither if it does not "
            "apply.\n\n### Statement\n{rule}\n\n### Conversation\n"
        ),
        response="### Response\n",
        question="### Yes, No or Neither?",
    ),
}


@dataclass(frozen=True)
class Questions:
    """A tree whose leaves are questions about one pair.

    Attributes:
        sides: the responses that each run of leaves is about: 0 for A, 1 for B, both where they are the same.
        rules: positions in the pool; every run of leaves asks them in this order.
    """

    tree: PrefixTree
    sides: tuple[tuple[int, ...], ...]
    rules: tuple[int, ...]


class JudgePrompt:
    """Builds the trees of a pool's questions, and knows the token ids of the answers.

    Attributes:
        answers: token ids of Yes, No and Neither, one tuple of spellings each.
        skipped: spellings that are not one token.
    """

    def __init__(self, chat: ChatTokenizer, pool: RulePool, template: str = "conversation-first"):
        if template not in TEMPLATES:
            raise InputError(f"template {template!r} is unknown; known: {', '.join(TEMPLATES)}")
        self.chat, self.pool, self.template = chat, pool, TEMPLATES[template]
        # Characters that a template which escapes or changes what is said would change.
        slot = '(the "Text" of <the> question & its \\ last\nline)'
        around = chat.render([{"role": "user", "content": slot}], add_generation_prompt=True).split(slot)
        if len(around) != 2:
            raise InputError(f"{chat.where}: the chat template must write a user's message once, as it is")
        self._head, tail = around
        self._question = self.template.question + tail
        self._rule_first = "{rule}" in self.template.opening
        # Tokenised after a stand-in for the conversation; every response checks its own boundary again. What all
        # questions begin with ("### Statement\nThe response") belongs to the run above them.
        stub = [self.text(({"role": "user", "content": "Hello."},), "Hello.", rule) for rule in range(len(pool))]
        full = chat.encode_many(stub)
        shared = common_prefix(full)
        self._branches = [ids[shared:] for ids in full]
        self.answers, self.skipped = self._answer_ids(stub[0], full[0])

    def _answer_ids(self, context: str, context_ids: np.ndarray) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
        skipped: list[str] = []
        owner: dict[int, str] = {}
        for answer in ANSWERS:
            for spelling in (s + word for word in (answer, answer.lower(), answer.upper()) for s in ("", " ")):
                ids = self.chat.encode(context + spelling)
                if len(ids) != len(context_ids) + 1 or not np.array_equal(ids[:-1], context_ids):
                    skipped.append(spelling)
                elif owner.setdefault(int(ids[-1]), answer) != answer:
                    where = f"{self.chat.where}: token {ids[-1]}"
                    raise InputError(f"{where} spells both {owner[int(ids[-1])]} and {answer}; take another tokenizer")
        ids = tuple(tuple(sorted(i for i, a in owner.items() if a == answer)) for answer in ANSWERS)
        if missing := [answer for answer, found in zip(ANSWERS, ids, strict=True) if not found]:
            raise InputError(f"{self.chat.where}: no spelling of {missing[0]!r} is one token; take another tokenizer")
        return ids, skipped

    def _before(self, prompt: Sequence[Mapping[str, str]], response: str, rule: int) -> str:
        """The question up to the end of the response."""
        opening = self.template.opening.replace("{rule}", self.pool[rule].text)
        return f"{self._head}{opening}{transcript(prompt)}{self.template.response}{quote(response)}\n\n"

    def _after(self, rule: int) -> str:
        return self._question.replace("{rule}", self.pool[rule].text)

    def text(self, prompt: Sequence[Mapping[str, str]], response: str, rule: int) -> str:
        """The whole rendered question about one rule, as ``ChatTokenizer.encode`` reads it."""
        return self._before(prompt, response, rule) + self._after(rule)

    def _run(self, prompt, response: str, rules: Sequence[int]) -> Node:
        """The question's beginning as one run of tokens, below it the rules."""
        if self._rule_first:
            (rule,) = rules
            return Node(self.chat.encode(self.text(prompt, response, rule)))
        text = self._before(prompt, response, rules[0])
        branches = [self._branches[rule] for rule in rules]
        first, last = self.chat.encode_many(text + self._after(rule) for rule in (rules[0], rules[-1]))
        ids = first[: -len(branches[0])]
        same = np.array_equal(first[len(ids) :], branches[0]) and np.array_equal(last, np.append(ids, branches[-1]))
        if not same:
            # Tokens merge across the boundary here: it moves to where all questions still agree.
            whole = self.chat.encode_many(text + self._after(rule) for rule in rules)
            cut = common_prefix(whole)
            ids, branches = whole[0][:cut], [one[cut:] for one in whole]
        return Node(ids, [Node(branch) for branch in branches])

    def groups(self, rules: Sequence[int]) -> list[tuple[int, ...]]:
        """Rules that share a tree."""
        return [(rule,) for rule in rules] if self._rule_first else [tuple(rules)]

    def reply_trees(
        self, prompt: Sequence[Mapping[str, str]], response: str, rules: Sequence[int]
    ) -> Iterator[Questions]:
        """One response and the given rules (positions in the pool), in their order."""
        for group in self.groups(rules):
            yield Questions(PrefixTree.build(self._run(prompt, response, group)), ((0,),), group)

    def pair_trees(
        self, prompt: Sequence[Mapping[str, str]], response_a: str, response_b: str, rules: Sequence[int]
    ) -> Iterator[Questions]:
        """Both responses, in the order of their token ids, and below each the given rules.

        What the two begin with stands once. Swapping the responses gives the same trees; where they are the same
        tokens, one run of leaves stands for both, so that they tie.
        """
        for group in self.groups(rules):
            runs = [self._run(prompt, response, group) for response in (response_a, response_b)]
            if np.array_equal(runs[0].tokens, runs[1].tokens):
                yield Questions(PrefixTree.build(runs[0]), ((0, 1),), group)
                continue
            sides = sorted((0, 1), key=lambda side: tuple(runs[side].tokens))
            cut = common_prefix([run.tokens for run in runs])
            below = [Node(runs[side].tokens[cut:], runs[side].children) for side in sides]
            tree = PrefixTree.build(Node(runs[0].tokens[:cut], below))
            yield Questions(tree, tuple((side,) for side in sides), group)
