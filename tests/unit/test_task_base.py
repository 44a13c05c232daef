"""What all tasks share: cutting, chat templates, descriptions, sources; infilling; and a comparison that uses all of it."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from dllm_toolkit import cli, registry
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation.answers import perplexity
from dllm_toolkit.evaluation.tasks import (
    GSM8K,
    Gap,
    GSMSymbolic,
    Infilling,
    ListOperations,
    Problem,
    Repeated,
    StoryArithmetic,
    TaskError,
    gsm_symbolic,
    sources,
)
from dllm_toolkit.evaluation.tasks.repeated import original
from dllm_toolkit.models.fresh import fresh
from dllm_toolkit.recipe import Lazy
from dllm_toolkit.testing.items import write_items


def test_all_tasks_are_registered() -> None:
    assert registry.names("task") == [
        "countdown", "gsm8k", "gsm_symbolic", "human_eval", "infilling", "list_operations", "math500", "mbpp", "repeated", "stories",
        "sudoku", "svamp",
    ]  # fmt: skip


def test_a_repeated_task_asks_each_problem_several_times() -> None:
    task, several = StoryArithmetic(size=2), Repeated(StoryArithmetic(size=2), times=3)
    first, second = task.problems()
    assert [one.id for one in several.problems()] == [f"{one.id}#{number}" for one in (first, second) for number in (1, 2, 3)]
    assert [original(one.id) for one in several.problems()] == [first.id] * 3 + [second.id] * 3
    last = several.problems()[-1]
    assert last.prompt == second.prompt and several.render(last, None) == task.render(second, None)
    assert several.grade(last, second.reference) == task.grade(second, second.reference) and several.extraction() == task.extraction()
    assert "answered 3 times" in several.describe()
    with pytest.raises(TaskError, match="Write times: 4"):
        Repeated(task, times=1)


# --- cutting, rendering, describing


def test_the_first_stop_string_cuts(tmp_path: Path) -> None:
    task = GSM8K(path=write_items(tmp_path)["gsm8k_test"], shots=0)
    assert task.cut("18 Question: a Question: b") == "18 " and task.cut("18") == "18" and task.cut("") == "" and task.cut("Question:") == ""
    assert StoryArithmetic().cut("anything Question: b") == "anything Question: b"


class Tokenizer:
    """The one method of a tokenizer with a chat template that rendering needs."""

    chat_template = "a template"

    def apply_chat_template(self, turns: list[dict], *, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt and not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def test_chat_templates_wrap_the_prompt_and_not_the_prefill() -> None:
    problem = Problem("own", "2 + 2?", "4", prefill="It is ")
    assert GSM8K().render(problem, Tokenizer()) == "2 + 2?It is "
    assert GSM8K(chat=True).render(problem, Tokenizer()) == "<user>2 + 2?<assistant>It is "
    plain = Tokenizer()
    plain.chat_template = None  # type: ignore[assignment]
    with pytest.raises(ToolkitError, match="task.chat=false"):
        GSM8K(chat=True).render(problem, plain)


def test_a_description_has_prompt_stops_and_rule(tmp_path: Path) -> None:
    paths = write_items(tmp_path)
    text = GSM8K(path=paths["gsm8k_test"], examples=paths["gsm8k_train"], shots=1).describe()
    assert "3 problems; the prompt of gsm8k-0:" in text and "  | Answer:" in text and "stop strings: 'Question:'" in text
    assert "form: running text, no chat template" in text and "graded: the first number behind the last `####`" in text
    assert "18" in text.partition("a right answer: ")[2]
    chat = GSM8K(path=paths["gsm8k_test"], shots=0, chat=True).describe()
    assert "one user's turn" in chat and "stop strings: none" in chat
    assert "never report this beside the GSM8K test score" in GSMSymbolic(path=paths["gsm_symbolic"]).describe()
    assert "[...]" in Infilling(size=1).describe()


def test_show_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "eval" / "gsm8k.yaml"
    paths = write_items(tmp_path)
    assert cli.main(["show", str(recipe), f"task.path={paths['gsm8k_test']}", f"task.examples={paths['gsm8k_train']}"]) == 0
    out = capsys.readouterr().out
    assert "# the task" in out and "  | Question: A baker fills 6 trays" in out and "stop strings: 'Question:'" in out and "graded: " in out


# --- sources


def test_files_in_every_form(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x\u2028y"}, {"a": 2, "b": "\u00e9"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    (tmp_path / "rows.csv").write_text('a,b\n1,"x, y"\n')
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.json"):
        assert sources.read(tmp_path / name, ("a", "b")) == rows
    assert sources.read(tmp_path / "rows.csv", ("a", "b")) == [{"a": "1", "b": "x, y"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read, got .*No such file"),
        (b"", "has no rows"),
        (b"{broken", "is no data file"),
        (b"[1, 2]", "is no data file.*no mapping"),
        (b'{"question": "x"}\n', "row 1 lacks answer; it has question"),
        (b'{"question": "x", "answer": "no mark"}\n', "no final `#### number`"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"\x1f\x8b\x00", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ToolkitError, match=message):
        GSM8K(path=path, shots=0).problems()
    with pytest.raises(ToolkitError, match="examples"):
        GSM8K(path=write_items(tmp_path)["gsm8k_test"], examples=tmp_path / "none.jsonl", shots=1).problems()


def test_the_hub_is_asked_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        return [{"question": f"How many? ({split})", "answer": "#### 3"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert GSM8K(shots=1).problems()[0].prompt.startswith("Question: How many? (train)\nAnswer: #### 3\n\nQuestion: How many? (test)")
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]


def test_offline_says_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ToolkitError, match=r"path is null.*Write task.path=FILE.*pip install 'dllm-toolkit\[eval\]'"):
        GSM8K(shots=0).problems()

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ToolkitError, match=r"ConnectionError: no route to the hub\).*Write task.path=FILE"):
        GSM8K(shots=0).problems()


def test_few_shots_without_examples_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ToolkitError, match=r"examples is null.*Write task.examples=FILE"):
        GSM8K(path=write_items(tmp_path)["gsm8k_test"], shots=4).problems()
    with pytest.raises(ToolkitError, match="the examples have 10 rows. Write shots: 10"):
        GSM8K(path=write_items(tmp_path)["gsm8k_test"], examples=write_items(tmp_path)["gsm8k_train"], shots=11).problems()
    with pytest.raises(ToolkitError, match="shots must be between"):
        GSM8K(shots=-1)


# --- GSM-Symbolic


def test_gsm_symbolic_from_a_file(tmp_path: Path) -> None:
    task = GSMSymbolic(path=write_items(tmp_path)["gsm_symbolic"], size=2)
    first, second = task.problems()
    assert task.grade(first, first.reference).correct and task.grade(second, "The answer is 1012").correct
    assert not task.grade(first, second.reference).correct and len(gsm_symbolic.TEMPLATES) == 71 == len(set(gsm_symbolic.TEMPLATES))


def test_gsm_symbolic_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ToolkitError, match=r"needs the package reasoning-gym.*pip install 'dllm-toolkit\[eval\]'"):
        GSMSymbolic(size=1).problems()


def test_gsm_symbolic_uses_right_templates_only_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the package: wrong templates and repeated questions are left out, the suffix is cut, the splits are disjoint."""

    class Drawn:
        def __init__(self, size: int, seed: int) -> None:
            self.task_indices, self.seed = [index % 6 for index in range(size)], seed

        def __getitem__(self, index: int) -> dict:
            question = f"Problem {self.seed % 1000 + index // 2} of template {self.task_indices[index]}?"
            ending = " Give the result as your final answer. Do not include units."
            return {"question": question + ending, "metadata": {"answer_cot": "So it is.\n#### 3"}}

    stand_in = types.SimpleNamespace(create_dataset=lambda name, size, seed: Drawn(size, seed))
    monkeypatch.setitem(sys.modules, "reasoning_gym", stand_in)
    questions = {}
    for split in ("train", "heldout"):
        problems = GSMSymbolic(size=80, split=split).problems()
        assert {problem.meta["template"] for problem in problems} <= {0, 1, 5}
        questions[split] = {problem.prompt for problem in problems}
        assert len(questions[split]) == 80 and not any("Do not include units." in prompt for prompt in questions[split])
    assert not questions["train"] & questions["heldout"]


def test_gsm_symbolic_from_the_package() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (pip install 'dllm-toolkit[eval]')")
    task, other = GSMSymbolic(size=20), GSMSymbolic(size=20, split="train")
    assert all(task.grade(problem, problem.reference).correct for problem in task.problems())
    assert not {p.prompt for p in task.problems()} & {p.prompt for p in other.problems()}
    assert all(problem.meta["template"] in gsm_symbolic.TEMPLATES for problem in task.problems())
    assert [p.prompt for p in GSMSymbolic(size=20).problems()] == [p.prompt for p in task.problems()]


# --- infilling


def test_infilling_of_stories() -> None:
    task = Infilling(size=12, seed=1)
    for problem in task.problems():
        assert problem.skeleton is not None and sum(isinstance(part, Gap) for part in problem.skeleton) == 1
        text = "".join(part.reference if isinstance(part, Gap) else part for part in problem.skeleton)
        assert text == problem.reference and isinstance(problem.skeleton[-1], str)
        right = task.grade(problem, text)
        assert right.correct and right.exact and right.steps_right == 1.0
    story = StoryArithmetic(size=12, seed=1).problems()[0]
    assert (task.problems()[0].prompt, task.problems()[0].reference) == (story.prompt, story.reference)


def test_infilling_grades() -> None:
    task = Infilling(size=1)
    meta = {"before": " She buys 3 + 4 = 7 pens.", "gap": " Then 7 - 2 = 5 are left.", "behind": " The answer is 5."}
    problem = Problem("own", "Question?", "", meta)
    filled = meta["before"] + "{}" + meta["behind"]
    same = task.grade(problem, filled.format(" Selling 2 leaves 7 - 2 = 5 pens."))
    assert same.correct and not same.exact and 0 < same.steps_right < 1  # the same equation in other words
    for wrong in (" Then 7 - 2 = 6 are left.", " Then five are left.", ""):
        assert not task.grade(problem, filled.format(wrong)).correct
    for broken in ("", meta["before"], meta["before"] + meta["gap"], meta["gap"] + meta["behind"], " The answer is 5."):
        verdict = task.grade(problem, broken)
        assert not verdict.correct and verdict.extra["read"] is None and verdict.steps_right == 0.0
    assert not task.grade(Problem("own", "Question?", "", {**meta, "before": " A. A. A.", "behind": " A. A."}), " A. A. A. A.").correct


def test_infilling_of_a_text(tmp_path: Path) -> None:
    task = Infilling(path=write_items(tmp_path)["text"], size=9)
    first, second = task.problems()
    assert first.prompt == "The boat left in the morning." and first.meta["gap"] == " Nobody was on the pier!"
    assert first.meta["before"] == " It had rained all night." and first.meta["behind"] == " The river was brown and fast. A dog barked."
    assert second.meta["gap"] == " Her brother did not answer."
    assert task.grade(first, first.reference).correct
    near = task.grade(first, first.reference.replace("Nobody was", "Nobody stood"))
    assert not near.correct and near.steps_right == pytest.approx(4 / 5)
    with pytest.raises(ToolkitError, match="has 10 sentences"):
        Infilling(path=write_items(tmp_path)["text"], sentences=11).problems()


def test_perplexity_is_that_of_a_plain_forward() -> None:
    import torch

    judge = fresh(width=16, layers=1, heads=2, attention="causal", shift=1, max_positions=96)
    task = Infilling(size=2, judge=Lazy.of(judge))
    task.ready()
    for problem in task.problems():
        extra = task.grade(problem, problem.reference).extra
        given, answer = (judge.tokenizer.encode(text, add_special_tokens=False) for text in (problem.prompt, problem.reference))
        answer = answer[: 96 - len(given)]
        tokens = torch.tensor([given + answer])
        logits = judge.logits(tokens).log_softmax(-1)[0]  # row i: the distribution of the token at position i
        loss = -sum(logits[len(given) + index, token].item() for index, token in enumerate(answer))
        assert extra["judge_tokens"] == len(answer) and extra["judge_loss"] == pytest.approx(loss, rel=1e-5)
        assert task.grade(problem, "").extra["judge_tokens"] == 0
    with pytest.raises(ToolkitError, match="judge must be an autoregressive model"):
        Infilling(judge=Lazy.of(fresh(width=16, layers=1, heads=2))).ready()
    assert perplexity([(2.0, 1), (4.0, 2)]) == pytest.approx(2.718281828**2) and perplexity([(0.0, 0)]) is None


# --- a comparison


RECIPE = """
task: {{_component_: {task}}}
models: {{tiny: {{_component_: fresh, width: 16, layers: 1, heads: 2, max_positions: 512}}}}
configurations:
  vanilla: {{model: tiny, decoder: {{_component_: vanilla, steps: 4}}}}
run: {{max_new_tokens: 12, warm_up: 0, device: cpu, batch_size: 2}}
output: {output}
report: {{tensorboard: false, html: false}}
"""


def compare(tmp_path: Path, task: str, *overrides: str) -> tuple[int, list[ledger.Record]]:
    path, output = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(RECIPE.format(task=task, output=output))
    code = cli.main(["compare", str(path), *overrides])
    return code, ledger.read(output / "ledger.jsonl")[1] if code == 0 else []


def test_infilling_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, records = compare(
        tmp_path, "infilling, size: 3, judge: {_component_: fresh, width: 16, layers: 1, heads: 2, attention: causal, shift: 1}"
    )
    assert code == 0 and len(records) == 3
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert row["perplexity"] > 1 and row["diversity"] is None and row["tokens"] == sum(record.tokens - record.given for record in records)
    for problem, record in zip(Infilling(size=3).problems(), records, strict=True):
        # What is pinned stays, is not counted as decoded, and was born at no step.
        assert record.text.startswith(problem.meta["before"]) or record.tokens < record.canvas_tokens
        gap = sum(born >= 0 for born in record.born)
        tokens = fresh(width=16, layers=1, heads=2).tokenizer.encode(problem.meta["gap"], add_special_tokens=False)
        assert gap == len(tokens) == record.commits and record.canvas_tokens > gap
        assert record.tokens < record.canvas_tokens or record.tokens - record.given == gap  # the rates count what was decoded


def test_raw_and_cut_text_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ListOperations, "stops", lambda self: (" ",))
    code, records = compare(tmp_path, "list_operations, size: 2, shots: 0")
    assert code == 0
    for record in records:
        assert record.text == record.raw_text.partition(" ")[0] and len(record.raw_text) >= len(record.text)
    assert any(record.text != record.raw_text for record in records)


def test_a_data_file_that_changed_is_another_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_items(tmp_path)
    task = f"gsm8k, path: {paths['gsm8k_test']}, shots: 0"
    assert compare(tmp_path, task)[0] == 0 and compare(tmp_path, task)[0] == 0
    paths["gsm8k_test"].write_text(paths["gsm8k_test"].read_text().replace("baker", "cook"))
    assert compare(tmp_path, task)[0] == 2 and "problems" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gsm8k, path: nowhere.jsonl", "nowhere.jsonl"),
        ("human_eval, path: nowhere.jsonl", "task.execute=true"),
        ("mbpp, path: nowhere.jsonl", "task.execute=true"),
        ("countdown, chat: true", "task.chat=false"),
        ("countdown, count: 99", "count must be between"),
    ],
)
def test_what_cannot_be_run_is_found_first(task: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, task)[0] == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
