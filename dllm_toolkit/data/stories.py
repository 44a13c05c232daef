"""Story arithmetic: GSM8K (Cobbe et al. 2021) in miniature, generated, for models of a few million weights.

A story is a word problem of dependent steps, a worked solution with one equation a step, and `The answer is
N.` It comes in two styles:

    terse    2 to 5 steps; the question's words decide the solution's words. `Question: ... Answer:`
    worded   3 to 7 steps; each is told in one of ten ways, whatever the question (data/worded.py). `Question: ... Explain:`

Why not harder tasks: a laptop must show what a decoder does to a model that is otherwise right. Why not
simpler ones: a bidirectional model reads a short answer straight off the question, so the damage of decoding
in parallel shows only in the worked steps. Hence four graders: the final answer, the equations, the steps,
and the exact solution (worded: a solution in any of the wordings). The terse style is right or wrong in
the same way however it is decoded; the worded one is where decoding rules differ, because tokens that are
committed together may belong to different wordings.

Train and held-out stories are disjoint by construction: a hash of a story's sequence of equations, without
its words, decides the split, so no held-out story repeats the arithmetic of any training story in other
words.

    python -m dllm_toolkit.data.stories --show 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, get_args

from dllm_toolkit.data import templates, worded
from dllm_toolkit.data.plan import ASKS, Draw, Event, Situation, plan
from dllm_toolkit.data.tokenizer import EOS, PAD, build_tokenizer, encode, split_words, vocabulary

if TYPE_CHECKING:
    import numpy

__all__ = [
    "ANSWER_LENGTH", "LENGTHS", "PROMPT_LENGTH", "Split", "Story", "Style", "build_tokenizer", "equations", "final_answer",
    "format_prompt", "grade_answer", "grade_equations", "grade_exact", "grade_steps", "split_of", "story",
    "token_arrays",
]  # fmt: skip

Split = Literal["train", "heldout"]
Style = Literal["terse", "worded"]
PROMPT_LENGTH = 80
"""Most tokens that a terse prompt has."""
ANSWER_LENGTH = 80
"""Most tokens that a terse solution has with its end token."""
LENGTHS: dict[Style, tuple[int, int]] = {"terse": (PROMPT_LENGTH, ANSWER_LENGTH), "worded": (112, 128)}
"""Of each style: most tokens of a prompt, and of a solution with its end token."""
HELDOUT_OF = 10
"""One in so many stories is held out."""
CHUNK = 1024


@dataclass(frozen=True)
class Story:
    """A word problem. `solution` starts with a space, so that prompt + solution is running text.

    `key` is the sequence of its equations, which decides its split; `steps` counts them. A worded solution is
    one of many right ones.
    """

    question: str
    solution: str
    answer: int
    steps: int
    key: str
    style: Style = "terse"


def split_of(key: str) -> Split:
    """The split that stories with this key belong to."""
    return "heldout" if zlib.crc32(key.encode()) % HELDOUT_OF == 0 else "train"


def story(seed: int, index: int, split: Split, style: Style = "terse") -> Story:
    """Story number `index` of the endless sequence that `seed` makes for `split` and `style`, always the same one."""
    if split not in get_args(Split):
        raise ValueError(
            f"unknown split, got {split!r}. Stories are drawn for training or held out. "
            "Write 'train' or 'heldout'."
        )
    if style not in get_args(Style):
        raise ValueError(f"unknown style, got {style!r}. It says how solutions are told. Write 'terse' or 'worded'.")
    name = f"story/{seed}/{index}/{split}" if style == "terse" else f"story/{style}/{seed}/{index}/{split}"
    draw = Draw(int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little"))
    prompt_length, answer_length = LENGTHS[style]
    while True:
        walk = plan(draw) if style == "terse" else plan(draw, worded.TARGETS)
        if walk is None:
            continue
        events, end = walk
        key = ";".join(f"{a}{op}{b}" for a, op, b in end.equations)
        if split_of(key) != split:
            continue
        question, solution = _tell(events, end, draw)
        if style == "worded":
            solution = worded.tell([(a, op, b, _result(a, op, b)) for a, op, b in end.equations], draw.pick)
        drawn = Story(question, solution, end.value, len(end.equations), key, style)
        prompt_fits = len(split_words(format_prompt(drawn))) <= prompt_length
        if prompt_fits and len(split_words(solution)) < answer_length:
            return drawn


def _result(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "x" else a // b


def _tell(events: list[Event], end: Situation, draw: Draw) -> tuple[str, str]:
    """Question and solution in words."""
    girl = draw.uniform() < 0.5
    # The two people of a comparison differ in their pronouns, so that "she" is never ambiguous.
    mine, theirs = (templates.GIRLS, templates.BOYS) if girl else (templates.BOYS, templates.GIRLS)
    pronouns = templates.PRONOUNS if girl else templates.PRONOUNS[::-1]
    slots: dict[str, object] = {"A": draw.pick(mine), "B": draw.pick(theirs)}
    slots["items"] = draw.pick(templates.ITEMS)
    while (friend := draw.pick(mine + theirs)) in slots.values():
        pass
    slots["C"] = friend
    slots["box"], slots["boxes"] = draw.pick(templates.BOXES)
    slots |= _pronoun_slots(pronouns[0])
    questions: list[str] = []
    solutions: list[str] = []
    for _, step, numbers in events:
        slots |= numbers
        _tell_step(step.wordings, slots, questions, solutions, draw)
        if step.to == "pair":
            slots["O"], slots["A"], slots["w"] = slots["A"], slots["B"], numbers["v"]
            slots |= _pronoun_slots(pronouns[1])
    if end.scene != "done":
        _tell_step(ASKS[end.scene], slots, questions, solutions, draw)
    solutions.append(templates.CLOSING.format(r=end.value))
    return " ".join(questions), " " + " ".join(solutions)


def _pronoun_slots(pronouns: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(("he", "He", "him", "his", "His"), pronouns, strict=True))


def _tell_step(
    wordings: templates.Wordings,
    slots: dict[str, object],
    questions: list[str],
    solutions: list[str],
    draw: Draw,
) -> None:
    question, solution = draw.pick(wordings)
    if "{S}" in question:
        slots["S"] = draw.pick(templates.SUBJECTS).format_map(slots)
    if "{place}" in question:
        slots["place"] = draw.pick(templates.PLACES)
    if "{thing" in question:
        slots["thing"], slots["things"] = draw.pick(templates.THINGS)
    if "{red}" in question:
        slots["red"] = draw.pick(templates.COLORS)
        while (other := draw.pick(templates.COLORS)) == slots["red"]:
            pass
        slots["blue"] = other
    if "{X}" in question:
        actor_has_more = slots["a"] == slots["v"]
        slots["X"], slots["Y"] = (slots["A"], slots["O"]) if actor_has_more else (slots["O"], slots["A"])
    questions.append(question.format_map(slots))
    if solution:
        solutions.append(solution.format_map(slots))


def format_prompt(story: Story) -> str:
    """The text before the solution; it ends exactly where the solution starts."""
    form = templates.PROMPT if story.style == "terse" else worded.PROMPT
    return form.format(question=story.question)


# --- graders: `text` is what a model wrote after the prompt, with or without what it wrote after the end

_ANSWER = re.compile(r"The answer is ([0-9]{1,9})(?![0-9])")
_EQUATION = re.compile(r"(?<![0-9])([0-9]{1,9}) ?([-+x/]) ?([0-9]{1,9}) ?= ?([0-9]{1,9})(?![0-9])")


def final_answer(text: str) -> int | None:
    """N of the last `The answer is N`; None if there is none."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


def equations(text: str) -> list[tuple[int, str, int, int]]:
    """Every `a op b = c` of the text in order, right or wrong."""
    return [(int(a), op, int(b), int(c)) for a, op, b, c in _EQUATION.findall(text)]


def _holds(a: int, op: str, b: int, c: int) -> bool:
    if op == "/":
        return b != 0 and a == b * c
    return c == (a + b if op == "+" else a - b if op == "-" else a * b)


def grade_answer(text: str, story: Story) -> bool:
    """Whether the final answer is the story's."""
    return final_answer(text) == story.answer


def grade_equations(text: str) -> tuple[int, int]:
    """How many of the text's equations are arithmetically right, and how many there are."""
    found = equations(text)
    return sum(_holds(*equation) for equation in found), len(found)


def grade_steps(text: str, story: Story) -> tuple[int, int]:
    """How many of the reference's equations appear in the text in their order, and how many there are.

    The length of the longest common subsequence, so that one step left out or put in costs that step only.
    """
    reference, found = equations(story.solution), equations(text)
    longest = [0] * (len(reference) + 1)
    for equation in found:
        before = longest[:]
        for position, wanted in enumerate(reference):
            if equation == wanted:
                longest[position + 1] = before[position] + 1
            else:
                longest[position + 1] = max(before[position + 1], longest[position])
    return longest[-1], len(reference)


def grade_exact(text: str, story: Story) -> bool:
    """Whether the text is the reference solution (worded: or the same steps in other wordings), surrounding white space aside."""
    if story.style == "worded":
        return worded.matches(text, equations(story.solution))
    return text.strip() == story.solution.strip()


# --- arrays


def token_arrays(
    split: Split,
    size: int,
    seed: int,
    workers: int = 0,
    prompt_length_max: int | None = None,
    answer_length: int | None = None,
    style: Style = "terse",
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Stories 0..size-1 of `seed` as token ids.

    Returns (tokens uint16 [size, prompt_length_max + answer_length], prompt_lengths int16 [size]). A row is
    the prompt, then an answer region of exactly `answer_length` tokens (the solution, then end tokens),
    then padding; both lengths default to the longest of the style. `workers` processes share the work (0:
    this process); the result does not depend on their number. They are spawned, so a script that calls this
    needs the usual `if __name__ == "__main__":`.
    """
    import numpy

    longest = LENGTHS[style]
    prompt_length_max = longest[0] if prompt_length_max is None else prompt_length_max
    answer_length = longest[1] if answer_length is None else answer_length
    if prompt_length_max < longest[0] or answer_length < longest[1]:
        raise ValueError(
            f"rows too short for a story, got prompt_length_max={prompt_length_max} and "
            f"answer_length={answer_length}. Nothing is cut off silently. "
            f"Write at least {longest[0]} and {longest[1]}."
        )
    if size < 0 or workers < 0:
        raise ValueError(f"size and workers count things, got {size} and {workers}. Write 0 or more.")
    tokens = numpy.empty((size, prompt_length_max + answer_length), dtype=numpy.uint16)
    prompt_lengths = numpy.empty(size, dtype=numpy.int16)
    starts = range(0, size, CHUNK)
    make = partial(_chunk, split, size, seed, prompt_length_max, answer_length, style)
    for start, (rows, lengths) in zip(starts, _map(make, starts, workers), strict=True):
        tokens[start : start + len(rows)] = rows
        prompt_lengths[start : start + len(rows)] = lengths
    return tokens, prompt_lengths


def _map(make: partial, starts: range, workers: int) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    if workers == 0:
        yield from map(make, starts)
        return
    # Spawn, not fork: the parent may hold threads (torch), and a forked copy of their locks can hang.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(make, starts)


def _chunk(
    split: Split, size: int, seed: int, prompt_length_max: int, answer_length: int, style: Style, start: int
) -> tuple[numpy.ndarray, numpy.ndarray]:
    import numpy

    table = vocabulary()
    stop = min(start + CHUNK, size)
    rows = numpy.full((stop - start, prompt_length_max + answer_length), table[PAD], dtype=numpy.uint16)
    lengths = numpy.empty(stop - start, dtype=numpy.int16)
    for row, index in enumerate(range(start, stop)):
        drawn = story(seed, index, split, style)
        prompt, solution = encode(format_prompt(drawn)), encode(drawn.solution)
        begin = len(prompt)
        rows[row, :begin] = prompt
        rows[row, begin : begin + len(solution)] = solution
        rows[row, begin + len(solution) : begin + answer_length] = table[EOS]
        lengths[row] = begin
    return rows, lengths


def main(arguments: list[str] | None = None) -> int:
    """Print a few stories."""
    parser = argparse.ArgumentParser(prog="python -m dllm_toolkit.data.stories", description=main.__doc__)
    parser.add_argument(
        "--show", type=int, default=5, metavar="N", help="how many stories to print, default 5"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sequence (default 0)")
    parser.add_argument(
        "--split", choices=get_args(Split), default="heldout", help="which split, default heldout"
    )
    parser.add_argument("--style", choices=get_args(Style), default="terse", help="how solutions are told, default terse")
    options = parser.parse_args(arguments)
    for index in range(options.show):
        drawn = story(options.seed, index, options.split, options.style)
        print(f"{format_prompt(drawn)}\n   {drawn.solution}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
