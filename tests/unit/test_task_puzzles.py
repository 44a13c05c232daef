"""Countdown, Sudoku and list operations: generators, splits, and graders on hand-checked answers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from dllm_toolkit.data import countdown, public, sudoku
from dllm_toolkit.data import list_operations as lists
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.answers import diversity
from dllm_toolkit.evaluation.tasks import CountdownTask, ListOperations, SudokuTask
from dllm_toolkit.testing.items import write_items

# --- Countdown


def test_countdown_problems_have_solutions() -> None:
    for count, index in itertools.product((2, 3, 4), range(30)):
        drawn = countdown.countdown(0, index, "train", count)
        assert len(drawn.numbers) == count and drawn.target in countdown.TARGETS
        assert countdown.solves(drawn.solution, drawn.numbers, drawn.target)
        assert drawn == countdown.countdown(0, index, "train", count)


def test_countdown_splits_are_disjoint_and_not_public() -> None:
    keys = {}
    for split in ("train", "heldout"):
        drawn = [countdown.countdown(seed, index, split) for seed in (0, 1) for index in range(100)]
        keys[split] = {countdown.key_of(one.numbers, one.target) for one in drawn}
        assert len(keys[split]) > 190 and all(countdown.split_of(key) == split and not public.is_public(key) for key in keys[split])
    assert not keys["train"] & keys["heldout"]


def test_public_problems_are_known_and_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(public._known()) == 756
    first = countdown.countdown(0, 0, "heldout")
    puzzle = sudoku.sudoku(0, 0, "heldout")
    hidden = {public.digest(countdown.key_of(first.numbers[::-1], first.target)), public.digest(sudoku.key_of(puzzle.puzzle))}
    monkeypatch.setattr(public, "_known", lambda: frozenset(hidden))
    assert countdown.countdown(0, 0, "heldout") != first and sudoku.sudoku(0, 0, "heldout") != puzzle


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(93 + (30 - 100))", (Fraction(23), (93, 30, 100))),
        ("7/2", (Fraction(7, 2), (7, 2))),
        ("3", (Fraction(3), (3,))),
        ("1/0", None),
        ("2**9", None),
        ("-3 + 4", None),
        ("f(3)", None),
        ("__import__('os')", None),
        ("3 +", None),
        ("3.5 + 1", None),
        ("(" * 150, None),
        ("1+" * 200 + "1", None),
        ("", None),
    ],
)
def test_values_of_expressions(expression: str, value: object) -> None:
    assert countdown.value_of(expression) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7 * 8 - 6", "7 * 8 - 6"),
        ("First 7*8=56, then 56-6=50.\n(7 * 8) - 6 = 50", "(7 * 8) - 6"),
        ("<answer> 7*8-6 </answer> I used 6 and 7 + 8.", "7*8-6"),
        ("7 x 8 \u2212 6".replace("\u2212", "-"), "7 * 8 - 6"),
        ("7 \\times 8 - 6", "7 * 8 - 6"),
        ("It is 50", None),
        ("", None),
    ],
)
def test_finding_the_expression(text: str, found: str | None) -> None:
    assert countdown.expression_of(text) == found


def test_countdown_grades(tmp_path) -> None:
    task = CountdownTask(path=write_items(tmp_path)["countdown"])
    first, second = task.problems()
    assert first.prompt == (
        "Problem: Use the numbers 6, 7, 8 with + - * / and brackets to make 50. Use each number exactly once. "
        "Write the expression on the last line.\nAnswer:"
    )
    assert task.grade(first, first.reference).correct and task.grade(second, "(3 + 40 / 5) * 5").correct is False
    assert task.grade(second, "3 * 5 + 40 = 55").correct
    for wrong in ("7 * 8", "7 * 8 - 6 + 0", "7 * 7 + 1", "(7 * 8 - 6", "50", "", "7 * 8 - 5", "6 + 7 + 8", "7 * 8 -"):
        assert not task.grade(first, wrong).correct, wrong
    assert task.cut("7 * 8 - 6\n\nProblem: more 1 + 1") == "7 * 8 - 6\n\n"
    assert CountdownTask(size=2, shots=1).problems()[0].prompt.startswith("Problem: Use the numbers 6, 2, 7 ")
    assert CountdownTask(size=3, chat=True).stops() == ()
    assert all(countdown.solves(expression, numbers, target) for numbers, target, expression in _examples())
    (tmp_path / "bad.jsonl").write_text('{"input": "a,b", "output": "3"}\n')
    with pytest.raises(ToolkitError, match="row 1"):
        CountdownTask(path=tmp_path / "bad.jsonl").problems()


def _examples() -> tuple:
    from dllm_toolkit.evaluation.tasks import countdown as module

    return module._EXAMPLES


def test_solving_by_trying() -> None:
    assert countdown.solve((1, 1, 1), 100) is None and countdown.solve((5,), 5) == "5"
    assert countdown.solves(countdown.solve((3, 8, 5), 23), (3, 8, 5), 23) is False or countdown.solve((3, 8, 5), 23)
    assert countdown.solves(countdown.solve((30, 100, 93), 23), (30, 100, 93), 23)


# --- Sudoku


def test_all_filled_grids() -> None:
    assert len(sudoku.grids()) == 288 == len(set(sudoku.grids())) and all(map(sudoku.is_filled, sudoku.grids()))
    assert len({sudoku.normal_form(grid) for grid in sudoku.grids()}) == 12
    assert not sudoku.is_filled("1234341221434312") and not sudoku.is_filled("1234") and not sudoku.is_filled("1234123412341234")


def test_sudoku_puzzles_have_one_solution() -> None:
    for blanks in (1, 8, sudoku.MOST_BLANKS):
        for index in range(5):
            drawn = sudoku.sudoku(0, index, "train", blanks)
            assert drawn.puzzle.count("0") == blanks and sudoku.solutions(drawn.puzzle) == [drawn.solution]
            assert drawn == sudoku.sudoku(0, index, "train", blanks)


def test_sudoku_splits_share_no_grid() -> None:
    forms = {}
    for split in ("train", "heldout"):
        drawn = [sudoku.sudoku(0, index, split) for index in range(60)]
        forms[split] = {sudoku.normal_form(one.solution) for one in drawn}
        assert not any(public.is_public(sudoku.key_of(one.puzzle)) for one in drawn)
    assert len(forms["train"]) == 10 and len(forms["heldout"]) == 2 and not forms["train"] & forms["heldout"]


GRID = "1234341221434321"


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        (GRID, GRID),
        (f"The puzzle 1004041020030020 becomes\n{GRID}.", GRID),
        ("1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", GRID),
        ("|1|2|3|4|\n|3|4|1|2|\n|2|1|4|3|\n|4|3|2|1|", GRID),
        ("4321432143214321\n" + GRID, GRID),
        (GRID[:15], None),
        (GRID + "1", None),
        ("1234 or 5678", None),
        ("", None),
    ],
)
def test_finding_the_grid(text: str, grid: str | None) -> None:
    assert sudoku.grid_of(text) == grid


def test_sudoku_grades(tmp_path) -> None:
    task = SudokuTask(path=write_items(tmp_path)["sudoku"])
    one, several = task.problems()
    assert one.prompt == (
        "Puzzle: Fill this 4x4 Sudoku: each row, column and 2x2 box holds the digits 1 to 4 once. The grid is 16 digits, row by row; 0 "
        "is an empty cell. Write the filled grid as 16 digits.\n1004041020030020\nSolution:"
    )
    right = task.grade(one, one.reference)
    assert right.correct and right.exact and right.steps_right == 1.0
    other = task.grade(several, "1234431221433421")  # another right grid of a puzzle that has two
    assert other.correct and not other.exact and other.steps_right == 1.0
    near = task.grade(one, "1234341221434322")
    assert not near.correct and near.steps_right == pytest.approx(8 / 9)
    assert not task.grade(one, "4321214334121234").correct  # a right grid, but of another puzzle
    for broken in ("", "1234", "1234 3412 2143 432", "x" * 99):
        verdict = task.grade(one, broken)
        assert not verdict.correct and verdict.steps_right == 0.0
    (tmp_path / "bad.csv").write_text("Puzzle,Solution\n1004,1234\n")
    with pytest.raises(ToolkitError, match="no puzzle with its solution"):
        SudokuTask(path=tmp_path / "bad.csv").problems()


# --- list operations


def problem(operation: str, items: tuple[str, ...] = ("Mara", "Hugo", "Alma"), **more) -> lists.ListProblem:
    return lists.ListProblem(operation, items, more.pop("answer", ()), **more)  # type: ignore[arg-type]


def test_every_drawn_answer_is_right() -> None:
    for operation in lists.OPERATIONS:
        for length, index in itertools.product((3, 6), range(8)):
            drawn = lists.list_problem(0, index, operation, length)
            assert lists.choice_of(drawn, drawn.answer) is not None and drawn == lists.list_problem(0, index, operation, length)
            assert len(set(drawn.items)) == length and drawn.new not in drawn.items
            assert "{" not in drawn.request


def test_fixed_operations() -> None:
    drawn = {operation: lists.list_problem(3, 1, operation, 4) for operation in lists.OPERATIONS}
    for operation, one in drawn.items():
        items = list(one.items)
        wanted = {
            "copy": items,
            "reverse": items[::-1],
            "sort": sorted(items),
            "insert": items[: one.place - 1] + [one.new] + items[one.place - 1 :],
            "remove": [name for name in items if name != one.old],
            "replace": [one.new if name == one.old else name for name in items],
        }.get(operation)
        if wanted is not None:
            assert list(one.answer) == wanted and lists.choices(one) == 1
            assert lists.choice_of(one, wanted) == 0 and lists.choice_of(one, wanted[:-1]) is None
            assert lists.choice_of(one, [*wanted, "Uwe"]) is None and lists.choice_of(one, []) is None


def test_open_operations() -> None:
    insert = problem("insert_anywhere", new="Zora")
    assert [
        lists.choice_of(insert, answer.split()) for answer in ("Zora Mara Hugo Alma", "Mara Hugo Alma Zora", "Mara Zora Hugo Alma")
    ] == [0, 3, 1]
    wrong = (["Mara", "Hugo", "Alma"], ["Zora", "Mara", "Hugo", "Alma", "Zora"], ["Zora", "Hugo", "Mara", "Alma"])
    assert all(lists.choice_of(insert, answer) is None for answer in wrong) and lists.choices(insert) == 4
    remove = problem("remove_any")
    assert lists.choice_of(remove, ["Mara", "Alma"]) == 1 and lists.choice_of(remove, ["Alma", "Mara"]) is None
    assert (
        lists.choice_of(remove, ["Mara", "Hugo", "Alma"]) is None
        and lists.choice_of(remove, ["Mara"]) is None
        and lists.choices(remove) == 3
    )
    replace = problem("replace_any", new="Zora")
    assert lists.choice_of(replace, ["Mara", "Hugo", "Zora"]) == 2 and lists.choice_of(replace, ["Zora", "Hugo", "Zora"]) is None
    assert lists.choice_of(replace, ["Mara", "Hugo", "Uwe"]) is None and lists.choices(replace) == 3
    shuffle = problem("shuffle")
    orders = [lists.choice_of(shuffle, order) for order in itertools.permutations(shuffle.items)]
    assert orders == [None, 1, 2, 3, 4, 5] and lists.choices(shuffle) == 5
    assert lists.choice_of(shuffle, ["Mara", "Mara", "Alma"]) is None and lists.choice_of(shuffle, ["Mara", "Hugo"]) is None


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (" Mara, Hugo, Alma", ("Mara", "Hugo", "Alma")),
        ("Sure!\nResult: Mara, Hugo, Alma.\nAnything else, please?", ("Mara", "Hugo", "Alma")),
        ("[\"Mara\", 'Hugo', Alma]", ("Mara", "Hugo", "Alma")),
        ("**Mara**, Hugo,, Alma,", ("Mara", "Hugo", "Alma")),
        ("Mara", ("Mara",)),
        ("Mara Hugo", ("Mara Hugo",)),
        ("", ()),
    ],
)
def test_finding_the_list(text: str, items: tuple[str, ...]) -> None:
    assert lists.items_of(text) == items


def test_list_operations_grades() -> None:
    task = ListOperations(size=40, shots=1)
    problems = task.problems()
    assert len({one.id for one in problems}) == 40 and {one.meta["operation"] for one in problems} == set(lists.OPERATIONS)
    assert all(task.grade(one, one.reference).correct and task.grade(one, one.reference).exact for one in problems)
    first = ListOperations(operation="reverse", size=1, shots=0, shortest=3, longest=3).problems()[0]
    names = [name.strip() for name in first.reference.split(",")]
    listed = ", ".join(reversed(names))
    assert first.prompt == f"List: {listed}\nWrite the list backwards, from its last name to its first.\nResult:"
    task = ListOperations(operation="reverse", size=1, shots=0, shortest=3, longest=3)
    wrong = task.grade(first, listed)
    assert not wrong.correct and wrong.steps_right == pytest.approx(1 / 3) and wrong.extra["read"] == names[::-1]
    for broken in ("", ", , ,", first.reference[:-3], "?"):
        assert not task.grade(first, broken).correct
    assert task.cut(f"{first.reference}\n\nList: a, b") == f"{first.reference}\n\n"
    assert "choice" not in wrong.extra


def test_diversity() -> None:
    def answers(*chosen: int | None, choices: int = 4) -> list[dict]:
        return [{"operation": "shuffle", "choice": one, "choices": choices} for one in chosen]

    assert diversity(answers(0, 1, 2, 3)) == pytest.approx(1.0) and diversity(answers(0, 0, 0, 0)) == 0.0
    assert diversity(answers(0, 0, 1, 1)) == pytest.approx(0.5)
    assert diversity(answers(0, 1, choices=99)) == pytest.approx(1.0)  # two answers cannot spread over more than two
    assert diversity(answers(0, 1, None, None)) == pytest.approx(1.0)  # wrong answers have no say
    assert diversity([*answers(0, 1), *answers(5, 5, 5, 5, 5, 5, choices=9)]) == pytest.approx(2 / 8)
    assert diversity([]) is None and diversity([{"read": "x"}]) is None and diversity(answers(2)) is None
    third = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert diversity(answers(0, 0, 1)) == pytest.approx(third)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CountdownTask(count=9), "count"),
        (lambda: CountdownTask(shots=9), "shots"),
        (lambda: CountdownTask(size=0), "size"),
        (lambda: SudokuTask(blanks=0), "blanks"),
        (lambda: SudokuTask(seed=-1), "seed"),
        (lambda: ListOperations(shortest=5, longest=4), "shortest"),
        (lambda: ListOperations(shots=-1), "shots"),
    ],
)
def test_wrong_arguments(make, message: str) -> None:
    with pytest.raises(ToolkitError, match=rf"{message}.*Write"):
        make()
