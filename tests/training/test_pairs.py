"""Rows of one's own: what becomes of a file, what is left out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_toolkit.training.data import Data, DataError, StoryData
from dllm_toolkit.training.pairs import PairData

ROWS = [{"prompt": f"Question: Max has {number} eggs. Explain:", "answer": f" Max has {number} eggs."} for number in range(8)]


def data(tmp_path: Path, rows: Any = ROWS, **options: Any) -> PairData:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PairData("asset:teacher", path, **{"answer_length": 16, "prompt_length_max": 32, "heldout": 2, "batch_size": 2, **options})


def test_rows_are_prompt_answer_and_end(tmp_path: Path) -> None:
    made = data(tmp_path)
    tokenizer = made.tokenizer()
    train, heldout = made.sources(torch.device("cpu"), 0)
    assert train.tokens.shape[0] == 6 and heldout.tokens.shape[0] == 2 and train.tokens.shape[1] % 8 == 0
    batch = train.whole(0)
    for tokens, length in zip(batch.tokens.tolist(), batch.prompt_length.tolist(), strict=True):
        prompt, answer = tokens[:length], tokens[length : length + 16]
        number = tokenizer.decode(prompt).split("has ")[1].split(" eggs")[0]
        assert tokenizer.decode(prompt) == f"Question: Max has {number} eggs. Explain:"
        end = answer.index(tokenizer.eos_token_id)
        assert tokenizer.decode(answer[:end]) == f" Max has {number} eggs." and set(answer[end:]) == {tokenizer.eos_token_id}
    example = made.examples(1)[0]
    assert example.grade(" Max has" + example.text.split("Max has")[1].split(".")[0] + ".\n") and not example.grade("eggs")


def test_rows_of_one_prompt_stay_together(tmp_path: Path) -> None:
    """However the rows are ordered, and whatever else is in the file."""
    twice = [*ROWS, *({**row, "answer": " eggs."} for row in ROWS)]
    texts = []
    for rows in (twice, twice[::-1]):
        made = data(tmp_path, rows)
        texts.append({one.text for one in made.examples(99)})
        assert len(made.examples(99)) == 4 and not texts[-1] & {one.text for one in made.examples(99, "train")}
    assert texts[0] == texts[1]


def test_what_does_not_fit_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = data(tmp_path, [*ROWS, {"prompt": "Question:", "answer": " eggs" * 40}, {"prompt": "eggs " * 40, "answer": " eggs."}])
    assert len(made.examples(99, "train")) == 6
    assert "2 of 10 rows are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (ROWS, {"prompt": "question"}, "row 1 lacks question; it has prompt, answer"),
        ([*ROWS, {"prompt": "Question:", "answer": 3}], {}, "answer of row 9 must be text, got 3"),
        (ROWS, {"answer_length": 2}, "no rows are left to train on, got 0 that fit"),
        (ROWS, {"heldout": 8}, "got 8 that fit, of 8 prompts, and heldout 8"),
        (ROWS, {"end": "<|nothing|>"}, "end is no token of this tokenizer"),
        (ROWS, {"hub": "some/data"}, "write either path or hub"),
        (ROWS, {"prompt_format": "Question"}, "prompt_format must contain {prompt}"),
        (ROWS, {"size": 0}, "size must be at least 1"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, rows: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        data(tmp_path, rows, **options).sources(torch.device("cpu"), 0)
    assert said in str(error.value)


def test_rows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="32 \\+ 16 tokens do not fit the model"):
        data(tmp_path).check(40)


def test_an_edited_file_is_other_data(tmp_path: Path) -> None:
    """What was recorded for its prompts is not taken for the new ones."""
    before = data(tmp_path).identity()
    assert data(tmp_path).identity() == before != data(tmp_path, [*ROWS[:-1], {**ROWS[-1], "answer": " eggs."}]).identity()


def test_data_of_ones_own_are_told_apart_by_what_they_say() -> None:
    """The size of a batch is no part of what rows are; a class without fields has nothing to tell two of its objects apart but its repr."""
    own: Any = type("Own", (Data,), {})
    own.__abstractmethods__ = frozenset()
    assert StoryData(batch_size=8).identity() == StoryData(batch_size=16).identity() != StoryData(size=9).identity()
    first, second = own(), own()
    assert first.identity() != second.identity() and first.identity() == first.identity()


def test_numbers_are_graded_as_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question: {one}", "answer": " The answer is 12."} for one in range(4)]
    grade = data(tmp_path, rows, grade="number").examples(1)[0].grade
    assert grade("so 3 x 4 = 12.") and not grade("so 3 x 4 = 13.") and not grade("eggs")
