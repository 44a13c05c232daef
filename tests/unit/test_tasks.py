"""Story arithmetic as a task: fixed problems, and a grader that no broken answer upsets."""

import pytest

from dllm_toolkit import registry
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.tasks import StoryArithmetic, Task


def test_problems_are_fixed_and_prefix_stable() -> None:
    few, more = StoryArithmetic(size=3, seed=5).problems(), StoryArithmetic(size=6, seed=5).problems()
    assert tuple(more[:3]) == tuple(few)
    assert len({problem.id for problem in more}) == len({problem.prompt for problem in more}) == 6
    assert StoryArithmetic(size=3, seed=6).problems()[0].prompt != few[0].prompt
    assert StoryArithmetic(size=3, seed=5, split="train").problems()[0].prompt != few[0].prompt


def test_grading() -> None:
    task = StoryArithmetic(size=8, seed=1)
    for problem in task.problems():
        best = task.grade(problem, problem.reference)
        assert (best.correct, best.steps_right, best.exact) == (True, 1.0, True)
        answer = problem.reference[problem.reference.index("The answer is") :]
        guessed = task.grade(problem, answer)  # the final answer alone hides what is missing
        assert (guessed.correct, guessed.steps_right, guessed.exact) == (True, 0.0, False)
        for broken in ("", "The answer is", "The answer is 99999999.", "= = 3 + + 4 = <mask>", "\x00\ufffd"):
            verdict = task.grade(problem, broken)
            assert not verdict.correct and not verdict.exact and verdict.steps_right == 0.0


def test_one_wrong_step_costs_one_step() -> None:
    task = StoryArithmetic(size=20, seed=2)
    problem = next(p for p in task.problems() if p.meta["steps"] == 4)
    first = problem.reference.index("=") + 2
    wrong = problem.reference[:first] + "1" + problem.reference[first:]
    assert task.grade(problem, wrong).steps_right == pytest.approx(0.75)
    assert task.grade(problem, wrong).correct


def test_registered_and_checked() -> None:
    assert registry.lookup("task", "stories") is StoryArithmetic
    assert registry.kind_of(Task) == "task"
    for bad in ({"size": 0}, {"seed": -1}):
        with pytest.raises(ToolkitError, match="Write"):
            StoryArithmetic(**bad)
