"""Story arithmetic: determinism, disjoint splits, right solutions, an exact tokenizer, graders that
tell."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_toolkit.data import stories, templates, tokenizer, worded
from dllm_toolkit.data.plan import ENDINGS, STEPS, VALUE_MAX, VALUE_MIN
from dllm_toolkit.data.stories import Story, story

COUNT = 4000
PINNED = (
    "Question: Maya has 5 jars with 3 eggs in each. Ravi owns 5 eggs for every one that Maya has. "
    "How many eggs does he have now? Answer: The 5 jars hold 3 x 5 = 15 eggs. That gives Ravi 15 x 5"
    " = 75 eggs. The answer is 75."
)


@cache
def some(split: str, count: int = COUNT, style: str = "terse") -> list[Story]:
    return [story(7, index, split, style) for index in range(count)]


@pytest.fixture(scope="module")
def fast_tokenizer():
    return stories.build_tokenizer()


def test_the_same_arguments_give_the_same_story_in_another_process():
    code = "from dllm_toolkit.data.stories import story; print([story(3, i, 'heldout') for i in range(20)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == repr([story(3, index, "heldout") for index in range(20)])


def test_generated_text_is_pinned():
    """A change of this text makes the shipped models and their cards out of date."""
    first = story(0, 0, "heldout")
    assert stories.format_prompt(first) + first.solution == PINNED


def test_seeds_and_indices_give_different_stories():
    assert len({drawn.question for drawn in some("train")}) > 0.995 * COUNT
    assert story(1, 0, "train") != story(2, 0, "train")


def test_splits_share_no_arithmetic():
    train, heldout = ({drawn.key for drawn in some(split)} for split in ("train", "heldout"))
    assert not train & heldout
    assert {stories.split_of(key) for key in train} == {"train"}
    assert {stories.split_of(key) for key in heldout} == {"heldout"}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        story(0, 0, "test")


def test_solutions_are_right():
    for drawn in (*some("train"), *some("heldout")):
        found = stories.equations(drawn.solution)
        assert 2 <= drawn.steps == len(found) <= 5
        assert stories.grade_equations(drawn.solution) == (drawn.steps, drawn.steps)
        assert found[-1][-1] == drawn.answer == stories.final_answer(drawn.solution)
        assert all(VALUE_MIN <= number <= VALUE_MAX for a, _, b, c in found for number in (a, b, c))
        assert drawn.key == ";".join(f"{a}{op}{b}" for a, op, b, _ in found)
        assert drawn.solution.count("=") == drawn.steps


def test_every_step_depends_on_the_story_so_far():
    """A number stands in the question, is an earlier result, or is the 2 or 3 of "half" or "a third"."""
    for drawn in some("train"):
        known = {int(number) for number in re.findall("[0-9]+", drawn.question)}
        for a, op, b, c in stories.equations(drawn.solution):
            assert a in known and (b in known or (op in "x/" and b in (2, 3)))
            known.add(c)


def test_lengths():
    for drawn in (*some("train"), *some("heldout")):
        assert len(tokenizer.encode(stories.format_prompt(drawn))) <= stories.PROMPT_LENGTH
        assert len(tokenizer.encode(drawn.solution)) + 1 <= stories.ANSWER_LENGTH


def test_wording_is_rich_and_decides_the_solution():
    assert len(STEPS) + len(ENDINGS) >= 30
    assert all(len(wordings) >= 4 for wordings in templates.ALL_WORDINGS)
    questions = [question for wordings in templates.ALL_WORDINGS for question, _ in wordings]
    assert len(set(questions)) == len(questions)
    told = {step.wordings for step in (*STEPS.values(), *ENDINGS.values())}
    assert told | {templates.ASK, templates.MONEY_ASK} == set(templates.ALL_WORDINGS)
    by_question: dict[str, str] = {}
    for drawn in some("train"):
        assert by_question.setdefault(drawn.question, drawn.solution) == drawn.solution


def test_every_token_of_the_vocabulary_is_used():
    texts = (stories.format_prompt(drawn) + drawn.solution for drawn in (*some("train"), *some("train", 2000, "worded")))
    seen = {token for text in texts for token in tokenizer.encode(text)}
    words = tokenizer.vocabulary()
    # No number of a story starts with 0, but a model's answer and a reader's own problem may have one.
    assert {word for word, index in words.items() if index not in seen} == {*tokenizer.SPECIALS, " 0"}
    assert len(words) < 640


def test_tokenizer_round_trip(fast_tokenizer):
    for drawn in some("train", 1500):
        prompt = stories.format_prompt(drawn)
        text = prompt + drawn.solution
        ids = fast_tokenizer.encode(text)
        assert fast_tokenizer.decode(ids) == text
        assert fast_tokenizer.unk_token_id not in ids
        assert ids == fast_tokenizer.encode(prompt) + fast_tokenizer.encode(drawn.solution)
        assert ids == tokenizer.encode(text)


def test_worded_stories_fit_share_no_arithmetic_and_round_trip(fast_tokenizer):
    terse = {drawn.key for drawn in some("train")}
    for split in ("train", "heldout"):
        for drawn in some(split, 1000, "worded"):
            prompt = stories.format_prompt(drawn)
            assert prompt.endswith(" Explain:") and 3 <= drawn.steps <= 7
            assert len(tokenizer.encode(prompt)) <= stories.LENGTHS["worded"][0]
            assert len(tokenizer.encode(drawn.solution)) + 1 <= stories.LENGTHS["worded"][1]
            assert fast_tokenizer.decode(fast_tokenizer.encode(prompt + drawn.solution)) == prompt + drawn.solution
            assert stories.split_of(drawn.key) == split
            assert split == "train" or drawn.key not in terse


def test_worded_solutions_are_graded_by_their_steps_and_not_by_their_wording():
    first, second = (story(7, index, "heldout", "worded") for index in (0, 1))
    steps = stories.equations(first.solution)
    others = {worded.tell(steps, lambda choices, shift=shift: choices[shift % len(choices)]) for shift in range(12)}
    assert len(others) > 8
    for text in (first.solution, *others):
        assert stories.grade_exact(text, first)
        assert stories.grade_answer(text, first)
        assert stories.grade_steps(text, first) == (first.steps, first.steps)
    a, op, b, c = steps[0]
    for wrong in (
        second.solution,
        first.solution.replace(f" = {c}", f" = {c + 1}", 1),
        first.solution.rsplit(" The answer", 1)[0],
        first.solution.replace(f"{a} {op} {b} = {c}", f"{a} {op} {b} = {c} = {c}", 1),  # two wordings run into each other
        first.solution.replace(". ", " ", 1),
    ):
        assert not stories.grade_exact(wrong, first), wrong


def test_worded_wordings_are_free_of_the_question():
    """Several sentences for each kind of step appear, with and without a connective: a position has several likely tokens."""
    starts = {text.split()[0] for text in (drawn.solution for drawn in some("train", 500, "worded"))}
    assert len(starts) > 10


def test_a_digit_is_a_token(fast_tokenizer):
    assert fast_tokenizer.tokenize(" 14 + 9 = 23.") == [" 1", "4", " +", " 9", " =", " 2", "3", "."]


def test_tokenizer_saves_and_loads(fast_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    fast_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = stories.format_prompt(story(0, 1, "train")) + story(0, 1, "train").solution
    ids = loaded.encode(text)
    assert ids == fast_tokenizer.encode(text)
    assert loaded.decode([*ids, loaded.eos_token_id, loaded.pad_token_id], skip_special_tokens=True) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 1, 2)
    assert (loaded.bos_token_id, loaded.unk_token_id) == (3, 4)
    assert len(loaded) == len(tokenizer.vocabulary())


def test_unknown_word_is_refused():
    with pytest.raises(ValueError, match=r"got ' zebras'"):
        tokenizer.encode(" Mia has 14 zebras.")


def test_token_arrays(fast_tokenizer):
    tokens, lengths = stories.token_arrays("heldout", 300, seed=5, prompt_length_max=100, answer_length=97)
    assert tokens.shape == (300, 197) and tokens.dtype == numpy.uint16 and lengths.dtype == numpy.int16
    for index in range(0, 300, 17):
        drawn, row, begin = story(5, index, "heldout"), tokens[index].tolist(), int(lengths[index])
        assert row[:begin] == fast_tokenizer.encode(stories.format_prompt(drawn))
        solution = fast_tokenizer.encode(drawn.solution)
        assert row[begin : begin + len(solution)] == solution
        assert set(row[begin + len(solution) : begin + 97]) == {fast_tokenizer.eos_token_id}
        assert set(row[begin + 97 :]) <= {fast_tokenizer.pad_token_id}


def test_token_arrays_do_not_depend_on_the_workers():
    size = stories.CHUNK + 200
    alone, spawned = (stories.token_arrays("train", size, 1, workers) for workers in (0, 2))
    assert (alone[0] == spawned[0]).all() and (alone[1] == spawned[1]).all()
    shorter = stories.token_arrays("train", 100, 1)
    assert (shorter[0] == alone[0][:100]).all()


def test_token_arrays_refuse_rows_that_would_cut_stories():
    with pytest.raises(ValueError, match="Nothing is cut off silently"):
        stories.token_arrays("train", 1, 0, answer_length=32)
    with pytest.raises(ValueError, match="0 or more"):
        stories.token_arrays("train", -1, 0)
    assert stories.token_arrays("train", 0, 0)[0].shape == (0, stories.PROMPT_LENGTH + stories.ANSWER_LENGTH)


REFERENCE = Story(
    question="Mia has 14 shells.",
    solution=" Mia has 14 + 9 = 23 shells. She keeps 23 - 3 = 20. Each has 20 / 4 = 5. The answer is 5.",
    answer=5,
    steps=3,
    key="14+9;23-3;20/4",
)


@pytest.mark.parametrize(
    ("text", "answer", "arithmetic", "steps", "exact"),
    [
        (REFERENCE.solution, True, (3, 3), (3, 3), True),
        (REFERENCE.solution.strip() + "\n", True, (3, 3), (3, 3), True),
        ("", False, (0, 0), (0, 3), False),
        ("The answer is 5.", True, (0, 0), (0, 3), False),
        ("The answer is 4. The answer is 5", True, (0, 0), (0, 3), False),
        ("The answer is 55.", False, (0, 0), (0, 3), False),
        ("The answer is .", False, (0, 0), (0, 3), False),
        (REFERENCE.solution.replace("= 23", "= 24"), True, (2, 3), (2, 3), False),
        (REFERENCE.solution.replace("14 + 9 = 23", "13 + 9 = 22"), True, (3, 3), (2, 3), False),
        ("23 - 3 = 20 and 14 + 9 = 23 and 20 / 4 = 5", False, (3, 3), (2, 3), False),
        ("14 + 9 = 23, 1 x 1 = 1, 23 - 3 = 20, 20 / 4 = 5", False, (4, 4), (3, 3), False),
        ("5 / 0 = 0 and 7 / 2 = 3 and 4 x 3 = 12", False, (1, 3), (0, 3), False),
    ],
)
def test_graders(text, answer, arithmetic, steps, exact):
    assert stories.grade_answer(text, REFERENCE) is answer
    assert stories.grade_equations(text) == arithmetic
    assert stories.grade_steps(text, REFERENCE) == steps
    assert stories.grade_exact(text, REFERENCE) is exact


def test_a_repeated_equation_counts_once():
    twice = replace(REFERENCE, solution=" 1 + 1 = 2 and 2 x 2 = 4")
    assert stories.grade_steps("1 + 1 = 2, 1 + 1 = 2", twice) == (1, 2)


_pieces = st.lists(st.sampled_from([*"0123456789+-x/= .", "The answer is ", "14 + 9 = 23", "٣", "9" * 30]))


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(), _pieces.map("".join)))
def test_graders_accept_any_text(text):
    right, total = stories.grade_equations(text)
    assert 0 <= right <= total
    found, steps = stories.grade_steps(text, REFERENCE)
    assert 0 <= found <= steps == REFERENCE.steps and found <= total
    assert stories.grade_answer(text, REFERENCE) == (stories.final_answer(text) == REFERENCE.answer)
    stories.grade_exact(text, REFERENCE)


def test_command_prints_stories(capsys):
    assert stories.main(["--show", "2", "--split", "train"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Question:") == printed.count("The answer is") == 2
