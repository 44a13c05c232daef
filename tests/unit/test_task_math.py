"""MATH-500: the prompt, what is read from an answer, and agreement with math-verify itself (an optional package)."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.tasks import MATH500
from dllm_toolkit.evaluation.tasks.math500 import last_boxed, verified
from dllm_toolkit.testing.items import write_items

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (pip install 'dllm-toolkit[eval]')"
)


def test_prompt(tmp_path) -> None:
    paths = write_items(tmp_path)
    task = MATH500(path=paths["math500"])
    first = task.problems()[0]
    ending = "Reason step by step, and put the final answer into \\boxed{}."
    assert first.prompt == f"Problem: What is $\\frac{{1}}{{4}}+\\frac{{1}}{{2}}$?\n{ending}\nSolution:"
    assert first.reference == "Together they are $\\boxed{\\frac{3}{4}}$." and first.meta["answer"] == "\\frac{3}{4}"
    assert first.id == "math500-own/1.json" and task.stops() == ("Problem:",)
    chat = MATH500(path=paths["math500"], chat=True)
    assert chat.problems()[0].prompt == f"What is $\\frac{{1}}{{4}}+\\frac{{1}}{{2}}$?\n\n{ending}" and chat.stops() == ()


def test_worked_examples_come_from_a_file(tmp_path) -> None:
    paths = write_items(tmp_path)
    task = MATH500(path=paths["math500"], examples=paths["math500"], shots=2)
    prompt = task.problems()[0].prompt
    assert prompt.count("Problem: ") == 3 and prompt.count("\nSolution: ") == 2 and prompt.endswith("\nSolution:")
    with pytest.raises(ToolkitError, match="task.examples=FILE"):
        MATH500(path=paths["math500"], shots=2)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("so $\\boxed{3}$", "3"),
        ("\\boxed{\\frac{1}{2}} and then \\boxed{\\sqrt{\\frac{1}{2}}}.", "\\sqrt{\\frac{1}{2}}"),
        ("\\boxed{1} but \\boxed{2", "1"),
        ("\\boxed{", None),
        ("no box", None),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@needs_math_verify
def test_grades(tmp_path) -> None:
    task = MATH500(path=write_items(tmp_path)["math500"])
    task.ready()
    fraction, root, interval = task.problems()
    assert all(task.grade(problem, task.cut(problem.reference)).correct for problem in task.problems())
    for text in (
        "0.75",
        "\\boxed{0.75}",
        "$\\frac{6}{8}$",
        "The answer is 3/4.",
        "It is \\boxed{\\dfrac34}",
        "$\\boxed{1}$. No: $\\boxed{3/4}$.",
    ):
        assert task.grade(fraction, text).correct, text
    for text in ("", "\\boxed{", "\\boxed{\\frac{3}{", "0.74", "\\boxed{4/3}", "3/4 or 1/4, so \\boxed{1/4}", "\x00", "\\frac" * 50):
        assert not task.grade(fraction, text).correct, text
    assert task.grade(root, "\\boxed{2^{1/2}}").correct and not task.grade(root, "\\boxed{-\\sqrt{2}}").correct
    assert task.grade(interval, "\\boxed{(-1, \\; 3)}").correct and not task.grade(interval, "\\boxed{[-1,3]}").correct


FORMULAS = (
    ("\\frac{3}{4}", "0.75", "\\frac{4}{3}"), ("\\sqrt{2}", "2^{1/2}", "\\sqrt{3}"), ("12", "12.0", "13"), ("-5", "-5.0", "5"),
    ("(1,2)", "(1, 2)", "(2,1)"), ("\\{1,2,3\\}", "\\{3,2,1\\}", "\\{1,2\\}"), ("x^2+2x+1", "(x+1)^2", "x^2+1"), ("\\pi", "\\pi", "3\\pi"),
    ("1{,}000", "1000", "100"), ("50\\%", "50", "51"), ("\\frac{\\sqrt{3}}{2}", "\\sqrt{3}/2", "\\frac{1}{2}"),
    ("2\\pi r", "r \\cdot 2\\pi", "\\pi r"), ("(-\\infty,2]", "x \\le 2", "(-\\infty,2)"), ("\\text{even}", "\\text{even}", "\\text{odd}"),
    ("30^\\circ", "30", "60^\\circ"), ("\\frac{x}{y}", "x/y", "\\frac{y}{x}"),
)  # fmt: skip
ENDINGS = (
    "\\boxed{{{0}}}", "so $\\boxed{{{0}}}$.", "The answer is ${0}$.", "\\[ {0} \\]", "First ${1}$, but then $\\boxed{{{0}}}$.",
    "$\\boxed{{{0}}}$, not $\\boxed{{{1}}}$", "{0}",
)  # fmt: skip


def recorded() -> list[tuple[str, str]]:
    """(right answer, answer): as models write them."""
    made = []
    for answer, same, other in FORMULAS:
        for ending in ENDINGS:
            made += [(answer, ending.format(one, other)) for one in (answer, same, other)]
        made += [(answer, f"so $\\boxed{{{answer}"), (answer, "")]
    return made


@needs_math_verify
def test_agrees_with_math_verify_on_recorded_answers(tmp_path) -> None:
    """The reference grader is the package, called as its documentation says: verify(parse(gold), parse(answer))."""
    import math_verify

    from dllm_toolkit.evaluation.tasks import Problem

    outputs = recorded()
    assert len(outputs) >= 200
    task = MATH500(path=write_items(tmp_path)["math500"])
    task.ready()
    right = []
    for answer, text in outputs:
        reference = bool(math_verify.verify(math_verify.parse(f"\\boxed{{{answer}}}"), math_verify.parse(text)))
        ours = task.grade(Problem("own", "", "", {"answer": answer}), text).correct
        assert ours == reference == verified(answer, text), (answer, text)
        right.append(ours)
    assert 0.3 < sum(right) / len(right) < 0.9


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    task = MATH500(path=write_items(tmp_path)["math500"])
    assert "\\boxed{}" in task.describe()  # prompts need no grader
    with pytest.raises(ToolkitError, match=r"needs the package math-verify.*pip install 'dllm-toolkit\[eval\]'"):
        task.ready()
