"""Numbers in answers: where the final one stands, and what it is worth.

Three ways to read an answer, because tables in papers use all of them:

    answer     the number that is marked as the answer, else the last one; compared by value, 18 = 18.00 = $18
    strict     what the evaluation harness calls strict-match: `#### 18`, compared letter by letter after taking , $ and a last . away
    flexible   its flexible-extract: the last run of digits, compared in the same way. 18.00 is not 18 there
"""

import re
from fractions import Fraction
from typing import Literal

from dllm_toolkit.evaluation.tasks.base import Grade, graded

Extract = Literal["answer", "strict", "flexible"]

# A sign touches its number and stands behind no operand: `10 -3`, `10-3` and the bullet `- 3` hold no minus three at their end.
_TOKEN = re.compile(
    r"(?P<sign>(?<![\w.)$])(?<![\d)]\s)[-\u2212](?=[$\d.]))?\$?(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:\s?/\s?(?P<over>\d+(?:\.\d+)?))?"
)
_MARKS = tuple(re.compile(mark, re.IGNORECASE) for mark in (r"####", r"\b(?:final\s+)?answer\s*(?:is\b|:|=)\s*:?", r"\\boxed\s*\{"))
RULES = {
    "answer": "the first number behind the last `####` (else behind `answer is` or `answer:`, else in \\boxed{}; a mark counts if a number "
    "stands on its line), else the last number of the text; compared by value",
    "strict": "the first `#### number`; compared as text without , $ and a final .",
    "flexible": "the last run of two or more of the signs $ 0-9 . , or the last digits; compared as text without , $ and a final .",
}


def numbers(text: str) -> list[Fraction]:
    """All numbers of the text in order; currency, thousands separators and fractions are understood."""
    return [_worth(found) for found in _TOKEN.finditer(text)]


def _worth(found: re.Match[str]) -> Fraction:
    number = Fraction(found["number"].replace(",", ""))
    if found["over"] and (below := Fraction(found["over"])):
        number /= below
    return -number if found["sign"] else number


def final_number(text: str) -> Fraction | None:
    """The final answer under the rule `answer`; None if the text holds no number."""
    for mark in _MARKS:
        for place in reversed(list(mark.finditer(text))):
            found = numbers(text[place.end() :].lstrip(" *:\n" if mark is not _MARKS[0] else " ").partition("\n")[0])
            if found:
                return found[0]
    every = numbers(text)
    return every[-1] if every else None


_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def harness_answer(text: str, strict: bool) -> str:
    """What the evaluation harness's filters of gsm8k take from an answer; `[invalid]` where they find nothing."""
    if strict:
        found = _STRICT.search(text)
        return found[1].strip() if found else "[invalid]"
    every = [found[0] for found in _FLEXIBLE.finditer(text)]
    return every[-1].strip() if every else "[invalid]"


def plain(answer: str) -> str:
    """An answer as the harness compares it."""
    return re.sub(r"\.$", "", answer.replace(",", "").replace("$", "")).lower()


def grade_number(text: str, reference: str, extract: Extract) -> Grade:
    """Judge a text against the number `reference`; all three verdicts are kept."""
    found, right = final_number(text), numbers(reference)
    verdicts = {
        "answer": found is not None and bool(right) and found == right[0],
        "strict": plain(harness_answer(text, True)) == plain(reference),
        "flexible": plain(harness_answer(text, False)) == plain(reference),
    }
    read = {
        "answer": None if found is None else _shown(found),
        "strict": harness_answer(text, True),
        "flexible": harness_answer(text, False),
    }
    return graded(verdicts[extract], read=read[extract], **{f"by_{name}": verdict for name, verdict in verdicts.items()})


def _shown(number: Fraction) -> str:
    """As a decimal where it ends, as a fraction otherwise."""
    below = number.denominator
    while below % 2 == 0:
        below //= 2
    while below % 5 == 0:
        below //= 5
    return f"{float(number):.15g}" if below == 1 and abs(number) < 10**15 else str(number)
