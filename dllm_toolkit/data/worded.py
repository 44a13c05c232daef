"""The second style of story arithmetic: longer chains, and solutions whose wording is free.

In the terse style a question's words decide its solution's words, so a model can write many tokens at once and be right. Here every
step is told in one of several ways of different length and order, drawn without regard to the question:

    Then adding 19 gives 54 + 19 = 73. That makes 24, because 73 - 49 = 24. 24 - 14 = 10. Done: The answer is 10.

Until a few words of a sentence are there, nobody can know the others: each position by itself has several likely tokens, and tokens that
are committed together may come from two different sentences. That is what limits parallel decoding of language; here it can be measured.

Any of the wordings is right. `matches` says whether a text is a well-formed solution, whichever was chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from string import Formatter
from typing import Any

PROMPT = "Question: {question} Explain:"
TARGETS = (3, 4, 4, 5, 5, 5, 6, 6, 6, 7)
"""How many equations a walk has, drawn uniformly from these."""

OPENINGS = ("", "", "First, ", "Now ")
CONNECTIVES = ("", "", "Then ", "Next, ", "After that, ", "So ")
CLOSINGS = ("The answer is {c}.", "Done: The answer is {c}.", "That is all. The answer is {c}.", "After {n} steps: The answer is {c}.")
# {e} is the equation `a op b = c`. A wording after a connective starts in lower case.
SHARED = (
    "{e}.",
    "that makes {c}, because {e}.",
    "the number is {c}: {e}.",
    "from {a} we get {e}.",
    "the next number is {e}.",
    "we have {c}, as {e}.",
)
OWN = {
    "+": (
        "adding {b} gives {e}.",
        "with {b} more there are {e}.",
        "{b} more than {a} is {c}, for {e}.",
        "it grows by {b} to {c}, since {e}.",
    ),
    "-": (
        "taking {b} away leaves {e}.",
        "without {b} there are {e}.",
        "{b} less than {a} is {c}, for {e}.",
        "it falls by {b} to {c}, since {e}.",
    ),
    "x": (
        "{b} times as many are {e}.",
        "counting {a} again and again, {b} times, gives {e}.",
        "{b} times {a} is {c}, for {e}.",
        "it grows to {c}, since {e}.",
    ),
    "/": (
        "one of {b} equal parts is {e}.",
        "cut into {b} parts, each has {e}.",
        "{a} over {b} is {c}, for {e}.",
        "it falls to {c}, since {e}.",
    ),
}
Equation = tuple[int, str, int, int]


def wordings(operation: str) -> tuple[str, ...]:
    """Every way to tell a step with this operation."""
    return (*SHARED, *OWN[operation])


def tell(equations: Sequence[Equation], pick: Callable[[Sequence[str]], str]) -> str:
    """A solution in sentences, with a space in front; `pick` draws from the choices."""
    sentences = []
    for number, (a, operation, b, c) in enumerate(equations):
        lead = pick(CONNECTIVES if number else OPENINGS)
        sentence = pick(wordings(operation)).format(a=a, b=b, c=c, e=f"{a} {operation} {b} = {c}")
        sentences.append(lead + (sentence if lead else sentence[:1].upper() + sentence[1:]))
    sentences.append(pick(CLOSINGS).format(c=equations[-1][3], n=len(equations)))
    return " " + " ".join(sentences)


def matches(text: str, equations: Sequence[Equation]) -> bool:
    """Is the text a solution made of these equations in this order, in any of the wordings?"""
    parts = []
    for number, (a, operation, b, c) in enumerate(equations):
        told = [wording.format(a=a, b=b, c=c, e=f"{a} {operation} {b} = {c}") for wording in wordings(operation)]
        leads = {lead for lead in (CONNECTIVES if number else OPENINGS) if lead}
        plain = "|".join(re.escape(one[:1].upper() + one[1:]) for one in told)
        led = "|".join(map(re.escape, leads)) + ")(?:" + "|".join(map(re.escape, told))
        parts.append(f"(?:(?:{plain})|(?:{led}))")
    closings = "|".join(re.escape(one.format(c=equations[-1][3], n=len(equations))) for one in CLOSINGS)
    return re.fullmatch(" ".join((*parts, f"(?:{closings})")), text.strip()) is not None


def literals() -> list[str]:
    """Every sentence of this style, with the space before it and a digit in place of each slot: what the vocabulary is read from."""
    told = [wording for operation in OWN for wording in wordings(operation)]
    told += [one[:1].upper() + one[1:] for one in told]
    sentences = [*told, *CLOSINGS, *(lead.strip() for lead in (*OPENINGS, *CONNECTIVES))]
    return [" " + _literal(one) for one in sentences if one] + [_literal(PROMPT)]


def _literal(template: str) -> str:
    fields: list[tuple[str, Any, Any, Any]] = list(Formatter().parse(template))
    return "".join(words + ("" if slot is None else "0") for words, slot, _, _ in fields)
