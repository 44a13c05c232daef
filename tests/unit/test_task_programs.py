"""HumanEval and MBPP: prompts, finding the program in an answer, and running it only when the recipe says so."""

from __future__ import annotations

import sys

import pytest

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.tasks import MBPP, HumanEval, Problem
from dllm_toolkit.evaluation.tasks.programs import defines, fenced
from dllm_toolkit.testing.items import HUMAN_EVAL, write_items

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are held on Linux only")
EVENS = "    return [number for number in numbers if number % 2 == 0]\n"
WHOLE = f"def evens(numbers):\n{EVENS}"


@pytest.fixture
def paths(tmp_path):
    return write_items(tmp_path)


def test_fences() -> None:
    assert fenced("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1\n"
    assert fenced("```py\nx = 1") == "x = 1"  # cut off
    assert fenced("```python\nprint(f(1))\n```\n```python\ndef f(x):\n    return x\n```", "f") == "def f(x):\n    return x\n"
    assert fenced("  ```\n  x\n  ```") == "  x\n" and fenced("no block") is None and fenced("`x`") is None
    assert defines("async def f(): pass", "f") and defines("f = len", "f") and not defines("def ff(): pass", "f")
    assert not defines("    def f(): pass", "f")


def test_human_eval_prompts(paths) -> None:
    plain, chat, begun = (
        HumanEval(path=paths["human_eval"], **more).problems()[0] for more in ({}, {"chat": True}, {"chat": True, "prefill": True})
    )
    head = HUMAN_EVAL[0]["prompt"]
    assert plain.prompt == head and plain.prefill == "" and plain.reference == HUMAN_EVAL[0]["canonical_solution"]
    asked = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n" + head.strip() + "\n```"
    assert chat.prompt == begun.prompt == asked and chat.prefill == "" and begun.prefill == f"```python\n{head}"
    assert HumanEval(path=paths["human_eval"]).stops()[:5] == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert HumanEval(path=paths["human_eval"], chat=True).stops() == ()
    assert HumanEval(path=paths["human_eval"], chat=True, prefill=True).stops() == ("\n```",)
    with pytest.raises(ToolkitError, match="Write chat: true"):
        HumanEval(prefill=True)


def test_the_program_of_an_answer(paths) -> None:
    plain, chat = HumanEval(path=paths["human_eval"]), HumanEval(path=paths["human_eval"], chat=True)
    evens, quarter = chat.problems()
    assert plain.program(evens, EVENS) == HUMAN_EVAL[0]["prompt"] + EVENS
    assert chat.program(evens, f"Sure:\n```python\n{WHOLE}```\nDone.") == f"from typing import List\n\n\n\n{WHOLE}"
    assert chat.program(evens, WHOLE).endswith(WHOLE)  # without a block
    assert chat.program(evens, f"```python\n{EVENS}```").endswith(f'"""\n{EVENS}')  # the body alone
    # What the prompt defines before the function stays there.
    assert "def half(x):" in chat.program(quarter, "```python\ndef quarter(x):\n    return half(half(x))\n```")
    after = f"{EVENS}\nprint(evens([1]))\n\ndef other():\n    pass\n"
    assert plain.cut(after) == EVENS  # two line ends do not matter: what follows is cut away at its own first word
    assert plain.cut(EVENS + "\n\n\n# Test\nassert False") == EVENS + "\n\n"


@linux
def test_human_eval_grades(paths) -> None:
    plain = HumanEval(path=paths["human_eval"], execute=True, seconds=1, memory=256)
    for problem in plain.problems():
        verdict = plain.grade(problem, plain.cut(problem.reference))
        assert verdict.correct and verdict.exact and verdict.steps_right == 1.0 and verdict.extra["status"] == "passed"
    evens = plain.problems()[0]
    assert plain.grade(evens, plain.cut("    return [n for n in numbers if not n % 2]\n\nprint('test')\nboom")).correct
    for text, status in {
        "    return numbers\n": "failed",
        "    return [number for number in": "error",
        "": "failed",
        "    import os; os._exit(0)\n": "ended",
        "    while True: pass\n": "time",
        "    open('/tmp/dllm-toolkit-test', 'w')\n": "failed",
    }.items():
        verdict = plain.grade(evens, text)
        assert (verdict.correct, verdict.extra["status"]) == (False, status), text
    chat = HumanEval(path=paths["human_eval"], execute=True, chat=True, seconds=1, memory=256)
    assert all(chat.grade(problem, problem.reference).correct for problem in chat.problems())
    assert not chat.grade(evens, "I cannot help with that.").correct


def test_mbpp_prompts(paths) -> None:
    task = MBPP(path=paths["mbpp"], shots=2)
    first, second = task.problems()
    asked = "You are an expert Python programmer, and here is your task: Write a function that adds {0} to a number. "
    asked += "Your code should pass these tests:"
    tests = "\n\nassert add_{0}(0) == {0}\nassert add_{0}(1) == {1}\nassert add_{0}(-1) == {2}"

    def request(n: int) -> str:
        return asked.format(n) + tests.format(n, n + 1, n - 1)

    assert first.prompt == (
        f"{request(2)}\n[BEGIN]\ndef add_2(x):\n  return x + 2\n[DONE]\n\n"
        f"{request(3)}\n[BEGIN]\ndef add_3(x):\n  return x + 3\n[DONE]\n\n{request(11)}\n[BEGIN]\n"
    )
    assert (first.id, second.id) == ("mbpp-11", "mbpp-12") and task.stops() == ("[DONE]",)
    chat = MBPP(path=paths["mbpp"], shots=0, chat=True)
    assert chat.problems()[0].prompt == f"{request(11)}\n\nAnswer with one Python code block." and chat.stops() == ()
    with pytest.raises(ToolkitError, match="task.shots=0"):
        MBPP(path=paths["mbpp"], shots=5).problems()
    with pytest.raises(ToolkitError, match="Write shots: 3"):
        MBPP(shots=11)


@linux
def test_mbpp_grades(paths) -> None:
    task = MBPP(path=paths["mbpp"], execute=True, shots=0, seconds=1, memory=256)
    first = task.problems()[0]
    verdict = task.grade(first, task.cut(f"{first.reference}\n[DONE]\nrubbish"))
    assert verdict.correct and verdict.steps_right == 1.0
    assert task.grade(first, "```python\ndef add_11(x):\n    return x + 11\n```").correct
    half = task.grade(first, "def add_11(x):\n    return 11 if x == 0 else x")
    assert not half.correct and half.steps_right == pytest.approx(1 / 3)
    for text in ("", "def add_11(x:", "def add(x):\n    return x + 11", "I do not know"):
        assert not task.grade(first, text).correct
    with_setup = Problem("own", "", "", {"setup": "thing = Thing(3)", "tests": ("assert thing.value == 3",)})
    assert task.grade(with_setup, "class Thing:\n    def __init__(self, value):\n        self.value = value").correct


@pytest.mark.parametrize("kind", [HumanEval, MBPP])
def test_nothing_runs_unless_the_recipe_says_so(kind, paths, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_toolkit.evaluation import sandbox

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr(sandbox, "run", never)
    more = {"shots": 0} if kind is MBPP else {}
    task = kind(path=paths["mbpp" if kind is MBPP else "human_eval"], **more)
    assert task.problems() and task.describe()
    for ask in (task.ready, lambda: task.grade(task.problems()[0], "x")):
        with pytest.raises(ToolkitError, match="Write task.execute=true"):
            ask()


def test_human_eval_comes_from_its_package_without_a_path(tmp_path, monkeypatch: pytest.MonkeyPatch, paths) -> None:
    """Whatever package of that name is installed: its data file is read, and its code is not imported."""
    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    import gzip

    (package / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(paths["human_eval"].read_bytes()))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [problem.id for problem in HumanEval().problems()] == ["Own/0", "Own/1"]
