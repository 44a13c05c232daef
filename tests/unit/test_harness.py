"""lm_eval's own task definitions on local files and tiny models, end to end: counts, continuing, refusals, the sandboxed metric."""

import gzip
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'dllm-toolkit[harness]')")
lm_tasks = pytest.importorskip("lm_eval.tasks")
# Nothing here may reach the hub: a test that would needs a local file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from dllm_toolkit import cli, recipe  # noqa: E402
from dllm_toolkit.data import stories  # noqa: E402
from dllm_toolkit.evaluation import harness, harness_tasks, ledger, sandbox  # noqa: E402
from dllm_toolkit.evaluation.harness import HarnessRecipe  # noqa: E402
from dllm_toolkit.evaluation.harness_tasks import CodeMetric, HarnessError  # noqa: E402
from dllm_toolkit.models.load import load  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
RECIPE = """
model: {{_component_: load, path: "{model}"}}
decoder: {{_component_: semi_ar, block_length: 16, steps: 40}}
cache: dual
tasks: [gsm8k, humaneval]
data: {{gsm8k: {{train: {data}/train.jsonl, test: {data}/test.jsonl}}, humaneval: {{test: {data}/programs.jsonl.gz}}}}
shots: 0
execute: true
run: {{max_new_tokens: 80, batch_size: 2, device: cpu, threads: 1, warm_up: 0}}
output: {output}
report: {{tensorboard: false, html: false}}
"""
# The tiny model writes no Python, but a line behind `#` does no harm: the first two programs are right whatever it writes.
PROGRAMS = (
    ("def twice(x):\n    return 2 * x\n# ", "def check(candidate):\n    assert candidate(4) == 8\n", "twice"),
    ("def thrice(x):\n    return 3 * x\n# ", "def check(candidate):\n    assert candidate(4) == 12\n", "thrice"),
    ("def half(x):\n    return x\n# ", "def check(candidate):\n    assert candidate(4) == 2\n", "half"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word problems that the shipped model knows in GSM8K's form, and programs in HumanEval's."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed, count in (("train", 1, 4), ("test", 7, 5)):
        told = [stories.story(seed, index, "heldout") for index in range(count)]
        rows = [{"question": one.question, "answer": f"{one.solution.strip()}\n#### {one.answer}"} for one in told]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"task_id": f"Own/{number}", "prompt": prompt, "canonical_solution": "", "test": test, "entry_point": name}
        for number, (prompt, test, name) in enumerate(PROGRAMS)
    ]
    (folder / "programs.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder


@pytest.fixture
def written(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model="asset:teacher", data=data, output=tmp_path / "run"))
    return path


def run(path: Path, *overrides: str) -> dict:
    loaded = recipe.load(path, overrides).checked(HarnessRecipe)
    return harness.run_harness(loaded, loaded.build(HarnessRecipe))


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(HarnessError) as error:
        run(path, *overrides)
    assert not (path.parent / "run").exists()
    return str(error.value)


def test_the_harness_and_the_ledger_count_the_same(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """gsm8k and humaneval of lm_eval as they are, offline."""
    code = cli.main(["harness", str(written)])
    out, err = capsys.readouterr()
    assert code == 0, err
    last = json.loads(out.splitlines()[-1])
    header, records = ledger.read(written.parent / "run" / "ledger.jsonl")
    saved = json.loads((written.parent / "run" / "results.json").read_text())
    assert saved["ledger"] == {"gsm8k": [10, 0], "humaneval": [3, 0]}  # grades in common, grades that differ
    for name, metric, count in (
        ("gsm8k", "exact_match,strict-match", 5),
        ("gsm8k", "exact_match,flexible-extract", 5),
        ("humaneval", "pass@1,create_test", 3),
    ):
        mine = [record for record in records if record.configuration == name]
        assert len(mine) == count
        assert last["results"][name][metric] == pytest.approx(sum(record.extra["scores"][metric] for record in mine) / count)
    # The model writes "The answer is 48." without a `####`, so one score finds it and the other does not.
    rows = {row["name"]: row for row in last["rows"]}
    assert last["results"]["gsm8k"]["exact_match,flexible-extract"] >= 0.6 and rows["gsm8k"]["accuracy"] == 0
    assert rows["humaneval"]["accuracy"] == pytest.approx(2 / 3) and last["results"]["humaneval"]["sample_len"] == 3
    story = stories.story(7, 0, "heldout")
    assert records[0].prompt == f"Question: {story.question}\nAnswer:" and records[0].problem == "gsm8k-0"
    assert {record.canvas_tokens for record in records} == {80} and header.versions["lm_eval"] == lm_eval.__version__
    assert "humaneval allows 1024 tokens an answer; run.max_new_tokens=80 allows less" in err
    assert "pass@1" in out and "configuration" in out  # both tables


def test_a_run_goes_on_where_it_was_stopped(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written.parent / "run" / "ledger.jsonl"
    short = ("run.max_new_tokens=8", "decoder.steps=8")
    run(written, *short)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # one batch of two, one record of the next, half a line
    asked: list[int] = []
    original = harness_tasks.HarnessTask.grade
    monkeypatch.setattr(harness_tasks.HarnessTask, "grade", lambda self, *rest: asked.append(1) or original(self, *rest))
    results = run(written, *short)
    assert len(asked) == 6  # 5 + 3 answers, 2 of them there

    def stable(content: bytes) -> list[dict]:
        timed = ("seconds", "batch_seconds", "date", "peak_memory")
        return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in content.splitlines()]

    assert stable(path.read_bytes()) == stable(whole) and results["ledger"] == {"gsm8k": (10, 0), "humaneval": (3, 0)}


def test_the_harness_own_command_line_knows_the_model(
    written: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lm_eval run --model dllm_toolkit --model_args recipe=...`; local data by the harness's own means, a definition of the user's."""
    own = written.parent / "own"
    own.mkdir()
    definition = (TASKS / "gsm8k" / "gsm8k.yaml").read_text().replace("task: gsm8k", "task: own_gsm8k").replace("dataset_name: main", "")
    files = f"dataset_kwargs:\n  data_files: {{train: {data}/train.jsonl, test: {data}/test.jsonl}}\n"
    (own / "own.yaml").write_text(definition.replace("dataset_path: openai/gsm8k", f"dataset_path: json\n{files}"))
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would keep this test's stderr for all later ones
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(written.parent / "cache"))
    lines = RECIPE.format(model="asset:teacher", data=data, output=written.parent / "run").splitlines()
    plain = [line for line in lines if line.partition(":")[0] not in ("tasks", "data", "shots", "execute")]
    written.write_text("\n".join(plain))
    manager = lm_tasks.TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **named: manager(**named, include_defaults=False))  # ten seconds of index
    arguments = ["run", "--model", "dllm_toolkit", "--model_args", f"recipe={written},run.batch_size=3", "--tasks", "own_gsm8k"]
    code = harness.main([*arguments, "--num_fewshot", "0", "--limit", "3", "--include_path", str(own)])
    out, err = capsys.readouterr()
    assert code == 0, err
    header, records = ledger.read(written.parent / "run" / "ledger.jsonl")
    assert [record.problem for record in records] == ["own_gsm8k-0", "own_gsm8k-1", "own_gsm8k-2"] and header.batch_size == 3
    assert "own_gsm8k" in out and "batch size 3 and device cpu are the recipe's" in err
    right = sum(record.extra["scores"]["exact_match,flexible-extract"] for record in records) / 3
    assert f"|{right:6.4f}".rstrip("0").rstrip(".") in out.replace(" ", "")


def test_the_command_line_names_a_recipe_and_says_nothing_twice(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HarnessError, match="must name a recipe"):
        harness.from_arguments({"output": "x"})
    with pytest.raises(HarnessError, match="says tasks, data, shots, execute"):
        harness.from_arguments({"recipe": str(written)})
    assert harness.main([], command=lambda: harness.from_arguments({})) == 2
    assert "must name a recipe" in capsys.readouterr().err


# --- likelihoods


CHOICE = """
task: own_choice
dataset_path: json
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
---
"""
ROLLING = """
task: own_text
dataset_path: json
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
"""


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A recipe whose tasks ask for likelihoods, on a small autoregressive model."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "choice.yaml").write_text(CHOICE.replace("---\n", ""))
    (own / "text.yaml").write_text(ROLLING)
    story = stories.story(7, 1, "heldout")
    question = {"question": f"Question: {story.question} Answer: The answer is", "choices": ["64.", "17.", "8."], "label": 0}
    (tmp_path / "choice.jsonl").write_text((json.dumps(question) + "\n") * 1)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": f"{story.question}{story.solution} " * 4}) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{_component_: load, path: 'asset:autoregressive'}}\ndecoder: autoregressive\ncache: block_causal\n"
        f"tasks: [own_choice, own_text]\ninclude: {own}\n"
        f"data: {{own_choice: {{test: {tmp_path}/choice.jsonl}}, own_text: {{test: {tmp_path}/text.jsonl}}}}\n"
        f"run: {{batch_size: 4, device: cpu, dtype: float64, threads: 1}}\noutput: {tmp_path}/run\n"
    )
    return path


@pytest.fixture
def only_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the harness's own 14,000 definitions, whose index takes ten seconds."""
    manager = lm_tasks.TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **named: manager(**{**named, "include_defaults": False}))
    yield


@pytest.mark.usefixtures("only_own")
def test_likelihood_requests_of_a_causal_model_are_exact(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(judged)
    _, records = ledger.read(judged.parent / "run" / "likelihood.jsonl")
    model = load("asset:autoregressive").double()

    def log_p(context: list[int], answer: list[int]) -> float:
        logits = model.logits(torch.tensor([context + answer]))[0, len(context) :].log_softmax(-1)
        return float(logits.gather(1, torch.tensor(answer).unsqueeze(1)).sum())

    for record, answer in zip(records, ("64.", "17.", "8."), strict=True):
        context, whole = (model.tokenizer.encode(text, add_special_tokens=False) for text in (record.prompt, f"{record.prompt} {answer}"))
        assert record.reference == f" {answer}" and record.problem == f"own_choice-0-{records.index(record)}"
        assert record.extra["log_likelihood"] == pytest.approx(log_p(context, whole[len(context) :]), abs=1e-9)
        assert record.exact and record.extra["standard_error"] == 0 and record.nfe == 1
    best = max(records, key=lambda record: record.extra["log_likelihood"])
    assert results["results"]["own_choice"]["acc,none"] == float(best.reference == " 64.")
    assert results["results"]["own_choice"]["exact_match,none"] == float(records[0].correct)
    # 256 positions, a text of more: the first window is 255 tokens behind the start token, the second sees as much as fits.
    _, (rolled,) = ledger.read(judged.parent / "run" / "rolling_likelihood.jsonl")
    text = json.loads((judged.parent / "text.jsonl").read_text())["text"]
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 255 and rolled.nfe == 2 and rolled.tokens == len(ids)
    first = log_p([model.tokenizer.bos_token_id], ids[:255])
    begin = len(ids) - 256
    second = log_p(ids[begin:255], ids[255:])
    assert rolled.extra["log_likelihood"] == pytest.approx(first + second, abs=1e-6)
    words = len(re.split(r"\s+", text))  # the harness's count
    assert results["results"]["own_text"]["word_perplexity,none"] == pytest.approx(math.exp(-(first + second) / words))
    before = (judged.parent / "run" / "likelihood.jsonl").read_bytes()
    run(judged)
    assert (judged.parent / "run" / "likelihood.jsonl").read_bytes() == before  # nothing was asked again


@pytest.mark.usefixtures("only_own")
def test_likelihood_requests_of_a_diffusion_model_are_bounds(judged: Path) -> None:
    changed = ("model.path=asset:teacher", "decoder=vanilla", "cache=none", "tasks=[own_choice]", "likelihood.samples=7")
    rest = (f"data={{own_choice: {{test: {judged.parent / 'choice.jsonl'}}}}}", "run.seed=3")
    run(judged, *changed, *rest)
    _, records = ledger.read(judged.parent / "run" / "likelihood.jsonl")
    assert [len(record.output) for record in records] and all(record.extra["log_likelihood"] < 0 for record in records)
    for record in records:
        exact = 2 ** len(record.output) - 1 <= 7
        assert record.exact == exact and record.nfe >= (2 ** len(record.output) - 1 if exact else 7)


# --- what is refused, before anything is decoded or written


def test_programs_run_only_if_the_user_says_so(written: Path) -> None:
    message = refused(written, "execute=false")
    assert "humaneval is graded by running what the model wrote" in message and "Write execute=true" in message
    assert str(written) in message or "<override>" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("tasks=[]", "data={}"), "tasks is missing"),
        (("tasks=[gsm8k]",), "data.humaneval: this is none of the tasks, got 'humaneval'"),
        (("data.gsm8k.test=nowhere.jsonl",), "data.gsm8k.test: the file cannot be read"),
        (("data.gsm8k={test: TEST}",), "data.gsm8k: the data of gsm8k lacks what the task asks of it, got splits ['test'] and no 'train'"),
        (("run.max_new_tokens=250",), "the model has 256 positions"),
        (("shots=3",), "fewer shots"),
        (("chat=true",), "chat is true, but the model's tokenizer has no chat template"),
        (("run.device=cuda:9",), "run.device is not on this machine"),
        (("cache=block_causal",), "block_causal"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(written: Path, data: Path, overrides: tuple[str, ...], message: str) -> None:
    text = refused(written, *(one.replace("TEST", str(data / "test.jsonl")) for one in overrides))
    assert message in text and (str(written) in text or "<override>" in text)


@pytest.mark.usefixtures("only_own")
def test_an_unknown_task_is_answered_with_close_ones(written: Path, tmp_path: Path) -> None:
    message = refused(written, "tasks=[gsm8kk]", "data={}", f"include={TASKS / 'gsm8k'}")
    assert "got 'gsm8kk'" in message and "Close to it: gsm8k" in message
    assert "include must be a directory" in refused(written, f"include={tmp_path / 'none'}")


def test_a_recipe_without_a_decoder_or_tokenizer(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text(f"model: {{_component_: load, path: {tmp_path / 'silent'}}}\ntasks: [gsm8k]\n")
    assert cli.main(["harness", str(bare)]) == 2
    assert "missing key 'decoder'" in capsys.readouterr().err
    load("asset:teacher").save_pretrained(tmp_path / "silent")
    for file in (tmp_path / "silent").glob("tokenizer*"):
        file.unlink()
    assert "the model has no tokenizer" in refused(written, f"model.path={tmp_path / 'silent'}")


def test_without_the_harness_the_command_to_install_it_is_said(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = harness_tasks.importlib.util.find_spec
    monkeypatch.setattr(harness_tasks.importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest))
    assert "pip install 'dllm-toolkit[harness]'" in refused(written)


def test_a_recipe_for_the_harness_can_be_shown_without_it(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(written), "decoder.block_length=8"]) == 0
    out = capsys.readouterr().out
    assert "semi_ar" in out or "SemiAutoregressive" in out
    assert "gsm8k" in out and "# resolved recipe, hash" in out


def test_answers_that_are_judged_together_are_refused(written: Path) -> None:
    assert "humaneval for humaneval_64" in refused(written, "tasks=[humaneval_64]", f"data={{humaneval_64: {{test: {_file(written)}}}}}")


def _file(written: Path) -> str:
    return str(recipe.load(written).tree["data"]["humaneval"]["test"])


# --- the metric of programs


def test_the_metric_runs_programs_in_the_sandbox_and_only_when_told() -> None:
    asked = {"references": ["assert add(2, 3) == 5"], "predictions": [["def add(a, b): return a + b", "def add(a, b): return a * b"]]}
    metric = CodeMetric()
    assert metric.compute(**asked, k=[1])[0] == {"pass@1": 0.0}  # a task is being loaded: nothing ran
    with harness_tasks.execution(None), pytest.raises(HarnessError, match="Write execute=true"):
        metric.compute(**asked, k=[1])
    with harness_tasks.execution(sandbox.Limits(seconds=5)):
        shares, told = metric.compute(**asked, k=[1, 2, 3])
        assert shares == {"pass@1": 0.5, "pass@2": 1.0}
        assert [one["result"] for _, one in told[0]] == ["passed", "failed"]
        network = "import socket\nsocket.create_connection(('127.0.0.1', 9))"
        shares, told = metric.compute(references=["pass"], predictions=[[network]], k=[1])
        assert shares == {"pass@1": 0.0} and told[0][0][1]["result"] == "error"


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer() -> None:
    """Against enumeration of all choices of k of the answers."""
    from itertools import combinations

    for answers in range(1, 6):
        for right in range(answers + 1):
            for count in range(1, answers + 1):
                draws = list(combinations([True] * right + [False] * (answers - right), count))
                assert harness_tasks.pass_at(answers, right, count) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_task_that_runs_programs_by_itself_is_refused() -> None:
    class Config:
        def __init__(self, score: object) -> None:
            self.process_results = score

    class Unsafe:
        UNSAFE_CODE = True

        def __init__(self, score: object) -> None:
            self.config = Config(score)

    def own(doc, results):
        return {}

    with pytest.raises(HarnessError, match="outside the sandbox"):
        harness_tasks.require_execution({"cruxeval": Unsafe(own)}, execute=True)
    sys.modules[__name__].__dict__["METRIC"] = CodeMetric()
    try:
        harness_tasks.require_execution({"humaneval": Unsafe(own)}, execute=True)
    finally:
        del sys.modules[__name__].__dict__["METRIC"]
