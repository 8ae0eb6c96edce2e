"""What the judge reads: a conversation quoted as text, a response, and one statement a rule, as a prefix tree."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptrm.data.chat import ChatTokenizer
from adaptrm.errors import InputError
from adaptrm.prefix_tree import Node, PrefixTree, common_prefix
from adaptrm.rules import RulePool

ANSWERS = ("Yes", "No", "Neither")
# Where quoted text could pass for the transcript's own headings: at the start of a line, whatever ends lines.
# (Blanks leave line ends out: each begins a match of its own, so that many of them cost no more than their number.)
LINE_ENDS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
BLANK = rf"(?:[^\S{LINE_ENDS}]|[\u200b-\u200f\u2060\ufeff])"
FORGED = re.compile(rf"(^|[{LINE_ENDS}])({BLANK}*)(#|User:|Assistant:|System:)", re.IGNORECASE)


@dataclass(frozen=True)
class Template:
    """How a judge prompt is laid out; ``{rule}`` stands in the branch."""

    opening: str
    response: str
    branch: str


TEMPLATES = {
    "conversation-first": Template(
        opening=(
            "Read the conversation and the response of the assistant, then say whether the statement about the "
            "response is true. Answer Yes if it is true, No if it is not, Neither if it does not apply.\n\n"
            "### Conversation\n"
        ),
        response="### Response\n",
        branch="### Statement\n{rule}\n\n### Yes, No or Neither?",
    )
}


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
        slot = "(the text of the question)"
        around = chat.render([{"role": "user", "content": slot}], add_generation_prompt=True).split(slot)
        if len(around) != 2:
            raise InputError(f"{chat.where}: the chat template must write a user's message once, as it is")
        self._head, tail = around
        self._branch_texts = [self.template.branch.format(rule=rule.text) + tail for rule in pool]
        # Tokenised after a stand-in for the conversation; every response checks its own boundary again. What all
        # questions begin with ("### Statement\nThe response") belongs to the run above them.
        stub = self._prefix_text(({"role": "user", "content": "Hello."},), "Hello.")
        full = chat.encode_many(stub + text for text in self._branch_texts)
        shared = common_prefix(full)
        self._branches = [ids[shared:] for ids in full]
        self.answers, self.skipped = self._answer_ids(stub + self._branch_texts[0], full[0])

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

    def _prefix_text(self, prompt: Sequence[Mapping[str, str]], response: str) -> str:
        said = "".join(f"{m['role'].capitalize()}: {self._quote(m['content'])}\n\n" for m in prompt)
        return f"{self._head}{self.template.opening}{said}{self.template.response}{self._quote(response)}\n\n"

    def _quote(self, text: str) -> str:
        return FORGED.sub(r"\1\2\\\3", text)

    def text(self, prompt: Sequence[Mapping[str, str]], response: str, rule: int) -> str:
        """The whole rendered question about one rule, as ``ChatTokenizer.encode`` reads it."""
        return self._prefix_text(prompt, response) + self._branch_texts[rule]

    def _run(self, prompt, response: str, rules: Sequence[int]) -> Node:
        """The question's beginning as one run of tokens, below it the rules."""
        text = self._prefix_text(prompt, response)
        branches = [self._branches[rule] for rule in rules]
        first, last = self.chat.encode_many(text + self._branch_texts[rule] for rule in (rules[0], rules[-1]))
        ids = first[: -len(branches[0])]
        same = np.array_equal(first[len(ids) :], branches[0]) and np.array_equal(last, np.append(ids, branches[-1]))
        if not same:
            # Tokens merge across the boundary here: it moves to where all questions still agree.
            whole = self.chat.encode_many(text + self._branch_texts[rule] for rule in rules)
            cut = common_prefix(whole)
            ids, branches = whole[0][:cut], [one[cut:] for one in whole]
        return Node(ids, [Node(branch) for branch in branches])

    def reply_tree(self, prompt: Sequence[Mapping[str, str]], response: str, rules: Sequence[int]) -> PrefixTree:
        """One response, below it the given rules (positions in the pool), in their order."""
        return PrefixTree.build(self._run(prompt, response, rules))

    def pair_tree(
        self, prompt: Sequence[Mapping[str, str]], response_a: str, response_b: str, rules: Sequence[int]
    ) -> tuple[PrefixTree, bool]:
        """The prompt once, below it both responses in the order of their token ids, below each the rules.

        Returns:
            The tree, and whether response_b comes first. Swapping the responses gives the same tree. Where the two
            are the same tokens there is one run of rules, which stands for both.
        """
        a, b = (self._run(prompt, response, rules) for response in (response_a, response_b))
        if np.array_equal(a.tokens, b.tokens):  # the same question twice: asked once, so that the responses tie
            return PrefixTree.build(a), False
        cut = common_prefix([a.tokens, b.tokens])
        root = a.tokens[:cut]
        runs = [Node(run.tokens[cut:], run.children) for run in (a, b)]
        b_first = tuple(runs[1].tokens) < tuple(runs[0].tokens)
        return PrefixTree.build(Node(root, runs[::-1] if b_first else runs)), b_first
