"""Operations on short lists: what decoding in parallel can and cannot do, in its purest form.

After ParallelBench (arXiv 2510.04767): a list of names and a request. Some requests have one right answer, whose items can all be written
at once (copy, reverse, sort, insert at a place, remove a name, replace a name). The others leave a choice open (shuffle; insert, remove or
replace at a place of your own): each item by itself has several good values, and items that are written together may not fit each other.
What a perfect model can reach then is known in closed form (testing/ideal.py).

Lists, requests and names are this package's own. Names are single words and different, so every request is unambiguous; `sort` means the
order of the alphabet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, get_args

from dllm_toolkit.data.plan import Draw

Operation = Literal[
    "copy", "reverse", "sort", "insert", "remove", "replace", "insert_anywhere", "remove_any", "replace_any", "shuffle"
]  # fmt: skip
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
OPEN: tuple[Operation, ...] = ("insert_anywhere", "remove_any", "replace_any", "shuffle")
"""Operations with more than one right answer."""
SHORTEST, LONGEST = 3, 12
NAMES = (
    "Alma", "Bruno", "Clara", "Dario", "Edda", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Linus", "Mara", "Nils", "Olga", "Pablo",
    "Quinn", "Rosa", "Samir", "Tilda", "Uwe", "Vera", "Willem", "Xenia", "Yusuf", "Zora", "Anton", "Birgit", "Cosmo", "Dunja", "Emil",
    "Frida", "Goran", "Hanna", "Igor", "Jette",
)  # fmt: skip
_REQUESTS: dict[Operation, str] = {
    "copy": "Repeat the list.",
    "reverse": "Write the list backwards, from its last name to its first.",
    "sort": "Sort the list by the alphabet.",
    "insert": "Insert {new} so that it becomes name number {place} of the list.",
    "remove": "Remove {old} from the list.",
    "replace": "Put {new} in the place of {old}.",
    "insert_anywhere": "Insert {new} anywhere in the list, at a place of your choice.",
    "remove_any": "Remove one name of your choice from the list.",
    "replace_any": "Put {new} in the place of one name of your choice.",
    "shuffle": "Write the same names in another order, any order but the given one.",
}


@dataclass(frozen=True)
class ListProblem:
    """items: the list. new, old, place: what the request names, place from 1. answer: a right one, for open requests one of many."""

    operation: Operation
    items: tuple[str, ...]
    answer: tuple[str, ...]
    new: str = ""
    old: str = ""
    place: int = 0

    @property
    def request(self) -> str:
        return _REQUESTS[self.operation].format(new=self.new, old=self.old, place=self.place)


def list_problem(seed: int, index: int, operation: Operation, length: int) -> ListProblem:
    """Problem number `index` of the endless sequence that `seed` makes for an operation and a list of `length` names."""
    draw = Draw(int.from_bytes(blake2b(f"list/{seed}/{index}/{operation}/{length}".encode(), digest_size=8).digest(), "little"))
    pool = list(NAMES)
    items = tuple(pool.pop(int(draw.uniform() * len(pool))) for _ in range(length))
    new, old, place = draw.pick(pool), draw.pick(items), draw.between(1, length + 1)
    at = items.index(old)
    turn = draw.between(1, length - 1)
    answers: dict[Operation, tuple[str, ...]] = {
        "copy": items,
        "reverse": items[::-1],
        "sort": tuple(sorted(items)),
        "insert": (*items[: place - 1], new, *items[place - 1 :]),
        "insert_anywhere": (*items[: place - 1], new, *items[place - 1 :]),
        "remove": (*items[:at], *items[at + 1 :]),
        "remove_any": (*items[:at], *items[at + 1 :]),
        "replace": (*items[:at], new, *items[at + 1 :]),
        "replace_any": (*items[:at], new, *items[at + 1 :]),
        "shuffle": items[turn:] + items[:turn],
    }
    named = {"insert": (new, "", place), "remove": ("", old, 0), "replace": (new, old, 0), "insert_anywhere": (new, "", 0)}
    named |= {"replace_any": (new, "", 0)}
    return ListProblem(operation, items, answers[operation], *named.get(operation, ("", "", 0)))


def choice_of(problem: ListProblem, answer: Sequence[str]) -> int | None:
    """Which of the right answers this is, numbered from 0; None for a wrong one.

    insert_anywhere: the place of the new name. remove_any, replace_any: the place of the old one. shuffle: the rank of the permutation
    among all n!, so never that of the given order. Requests with one right answer: 0.
    """
    items, answer = list(problem.items), list(answer)
    if problem.operation == "insert_anywhere":
        place = answer.index(problem.new) if answer.count(problem.new) == 1 else -1
        return place if place >= 0 and answer[:place] + answer[place + 1 :] == items else None
    if problem.operation == "remove_any":
        rests = [items[:place] + items[place + 1 :] for place in range(len(items))]
        return rests.index(answer) if answer in rests else None
    if problem.operation == "replace_any":
        changed = [items[:place] + [problem.new] + items[place + 1 :] for place in range(len(items))]
        return changed.index(answer) if answer in changed else None
    if problem.operation == "shuffle":
        return _rank([items.index(name) for name in answer]) if sorted(answer) == sorted(items) and answer != items else None
    return 0 if tuple(answer) == problem.answer else None


def choices(problem: ListProblem) -> int:
    """How many right answers there are."""
    length = len(problem.items)
    if problem.operation == "shuffle":
        count = 1
        for factor in range(2, length + 1):
            count *= factor
        return count - 1
    return {"insert_anywhere": length + 1, "remove_any": length, "replace_any": length}.get(problem.operation, 1)


def _rank(permutation: list[int]) -> int:
    rank, rest = 0, sorted(permutation)
    for value in permutation:
        rank = rank * len(rest) + rest.index(value)
        rest.remove(value)
    return rank


_BRACKETS = re.compile(r"[\[\](){}\"'`*]")


def items_of(text: str) -> tuple[str, ...]:
    """The list in an answer: the first line that holds a comma, else the first that holds anything, without what stands before a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if "," in line), lines[0] if lines else "")
    line = _BRACKETS.sub("", line.rpartition(":")[2]).strip().rstrip(".")
    return tuple(item.strip() for item in line.split(",") if item.strip())
