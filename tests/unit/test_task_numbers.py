"""How final numbers are read, and that the harness's two scores are what the harness documents, on recorded answers."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from dllm_toolkit.evaluation.tasks import GSM8K, SVAMP
from dllm_toolkit.evaluation.tasks.numbers import final_number, grade_number, numbers
from dllm_toolkit.testing.items import GSM8K_TEST, GSM8K_TRAIN, write_items

ANSWERS = {
    # right, in many forms
    "6*8 = 48\n48-30 = 18\n#### 18": 18,
    "#### $18": 18,
    "#### 18.": 18,
    "#### 18.00": 18,
    "####18": 18,
    "#### -5": -5,
    "#### \u22125": -5,
    "#### 1,012": 1012,
    "#### 1/2": Fraction(1, 2),
    "#### .5": Fraction(1, 2),
    "The answer is 18.": 18,
    "So the answer is: 18 rolls": 18,
    "**Answer:** 18": 18,
    "Final answer: $1,250.50": Fraction(125050, 100),
    "the final answer is \\boxed{18}": 18,
    "\\boxed{18}": 18,
    "\\boxed{\\$18}": 18,
    "There are 18": 18,
    "That leaves 18 rolls.": 18,
    "the answer is -7": -7,
    # several numbers
    "#### 18 of 48": 18,
    "First 5, then 7, then 12": 12,
    "#### 5\n\n#### 18": 18,
    "#### Step 1: bake\nIt makes 48.\n#### 18": 18,
    "The answer is 3. No, wait. The answer is 18.": 18,
    "#### 18\nThis is more than 12.": 18,
    "10-3": 3,
    "10 - 3": 3,
    "10 -3": 3,
    "It takes 2 days, 3 hours": 3,
    # malformed and truncated
    "": None,
    "####": None,
    "no number at all": None,
    "#### many": None,
    "6*8 = 48\n48-30 =": 30,
    "6*8 = 48\n#### ": 48,
    "The answer is": None,
    "\x00\ufffd": None,
    "- 3": 3,
    "#### 1/0": 1,
    "9" * 400: int("9" * 400),
}


@pytest.mark.parametrize("text", ANSWERS)
def test_final_number(text: str) -> None:
    assert final_number(text) == ANSWERS[text]


def test_numbers_in_order() -> None:
    assert numbers("-3, $4.50 and 1,000 of 2/3 (5-2)") == [-3, Fraction(9, 2), 1000, Fraction(2, 3), 5, 2]
    assert numbers("1,23 and 1,234,567") == [1, 23, 1234567]


# --- the harness: lm-evaluation-harness, tasks/gsm8k/gsm8k.yaml, written again from its documented regular expressions


def harness(text: str, solution: str) -> tuple[bool, bool]:
    """strict-match and flexible-extract of lm-eval's gsm8k (regex, group_select, fallback, take_first, exact_match with its ignores)."""

    def regex_filter(pattern: str, select: int) -> str:
        found = re.compile(pattern).findall(text)
        if not found:
            return "[invalid]"
        chosen = found[select]
        if isinstance(chosen, tuple):
            chosen = [one for one in chosen if one][0]
        return chosen.strip()

    def same(prediction: str, reference: str) -> bool:
        for ignored in (",", "\\$", "(?s).*#### ", "\\.$"):
            prediction, reference = re.sub(ignored, "", prediction), re.sub(ignored, "", reference)
        return prediction.lower() == reference.lower()

    strict = regex_filter("#### (\\-?[0-9\\.\\,]+)", 0)
    flexible = regex_filter("(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
    return same(strict, solution), same(flexible, solution)


ENDINGS = (
    "#### {n}", "#### {n}.", "#### ${n}", "####{n}", "#### {n} rolls", "#### {n}\n\nQuestion: what is 2 + 2?\nAnswer: 4\n#### 4",
    "#### {n}.00", "The answer is {n}.", "The answer is ${n}.", "the answer is {n} apples, and not {m}", "\\boxed{{{n}}}", "{n}", "**{n}**",
    "so {m} + 1 = {n}", "#### {m}", "The answer is {m}.", "#### {m}\n#### {n}", "#### {n}\n#### {m}", "#### many", "", "...", "It is -{n}",
    "#### -{n}", "{n}/1", "#### {n},", "= {n}\n####", "$ {n}", "{n} %",
)  # fmt: skip


def recorded() -> list[tuple[str, str, str]]:
    """(answer, solution, final number): answers as models write them, for every problem written for the tests."""
    rows = [*GSM8K_TEST, *GSM8K_TRAIN]
    made = []
    for row in rows:
        final = row["answer"].rpartition("#### ")[2]
        other = str(len(row["question"]))
        worked = row["answer"].rpartition("\n")[0]
        made += [(f"{worked}\n{ending.format(n=final, m=other)}", row["answer"], final) for ending in ENDINGS]
        made += [(row["answer"][:cut], row["answer"], final) for cut in (0, 10, len(worked), len(row["answer"]) - 1, len(row["answer"]))]
    return made


def test_agrees_with_the_harness_on_recorded_answers() -> None:
    outputs = recorded()
    assert len(outputs) >= 400
    scores = []
    for text, solution, final in outputs:
        ours = tuple(grade_number(text, final, extract).correct for extract in ("strict", "flexible"))
        assert ours == harness(text, solution), text
        scores.append(ours)
    # Neither score is trivial, and they differ.
    for column in zip(*scores, strict=True):
        assert 0.2 < sum(column) / len(scores) < 0.8
    assert sum(strict != flexible for strict, flexible in scores) > 20


def test_all_three_verdicts_are_kept() -> None:
    grade = grade_number("48-30 = 18\n#### 18.00", "18", "answer")
    assert grade.correct and grade.steps_right == 1.0 and not grade.exact
    assert grade.extra == {"read": "18", "by_answer": True, "by_strict": False, "by_flexible": False}
    assert grade_number("The answer is 18", "18", "strict").extra["read"] == "[invalid]"


# --- the tasks


def test_gsm8k_prompt(tmp_path) -> None:
    paths = write_items(tmp_path)
    task = GSM8K(path=paths["gsm8k_test"], examples=paths["gsm8k_train"], shots=2)
    first = task.problems()[0]
    assert first.prompt == (
        "Question: A box holds 9 pens. How many pens do 3 boxes hold?\nAnswer: 3 boxes hold 3*9 = 27 pens.\n#### 27\n\n"
        "Question: A box holds 12 pens. How many pens do 7 boxes hold?\nAnswer: 7 boxes hold 7*12 = 84 pens.\n#### 84\n\n"
        "Question: A baker fills 6 trays with 8 rolls each and sells 30 rolls. How many rolls are left?\nAnswer:"
    )
    assert first.reference.endswith("#### 18") and "<<" not in first.reference
    assert task.stops() == ("Question:",) and task.cut(" 18\n#### 18\n\nQuestion: next?") == " 18\n#### 18\n\n"
    assert len(task.problems()) == 3 and len(GSM8K(path=paths["gsm8k_test"], shots=0, size=2).problems()) == 2


def test_gsm8k_without_examples_and_in_a_chat(tmp_path) -> None:
    paths = write_items(tmp_path)
    plain, chat = (GSM8K(path=paths["gsm8k_test"], shots=0, chat=chat) for chat in (False, True))
    question = GSM8K_TEST[0]["question"]
    ending = "Think step by step. Then write the final answer, a number without units, on a last line that begins with ####."
    assert plain.problems()[0].prompt == f"Question: {question}\n{ending}\nAnswer:"
    assert chat.problems()[0].prompt == f"{question}\n\n{ending}" and chat.stops() == ()


def test_examples_are_a_fixed_draw(tmp_path) -> None:
    paths = write_items(tmp_path)

    def shown(**more) -> list[str]:
        prompt = GSM8K(path=paths["gsm8k_test"], examples=paths["gsm8k_train"], **more).problems()[0].prompt
        return prompt.split("\n\n")[:-1]

    assert shown(shots=4) == shown(shots=8)[:4] and len(set(shown(shots=8))) == 8
    assert shown(shots=4, example_seed=1) != shown(shots=4)
    assert "<<" in shown(shots=4, calculator=True)[0]


def test_gsm8k_grades(tmp_path) -> None:
    paths = write_items(tmp_path)
    for extract in ("answer", "strict", "flexible"):
        task = GSM8K(path=paths["gsm8k_test"], shots=0, extract=extract)
        assert all(task.grade(problem, task.cut(problem.reference)).correct for problem in task.problems())
        for broken in ("", "#### 17", "####", "Question: #### 18"):
            assert not task.grade(task.problems()[0], task.cut(broken)).correct
    assert "####" in GSM8K(path=paths["gsm8k_test"]).extraction()


def test_svamp(tmp_path) -> None:
    task = SVAMP(path=write_items(tmp_path)["svamp"])
    first, second = task.problems()
    assert first.prompt.startswith("Question: A shelf has 14 books. Ida takes 5 of them. How many books are left?\nThink step by step.")
    assert second.prompt.startswith("Question: A rope of 5 metres is cut into 2 equal pieces. How long is a piece?\n")
    assert (first.reference, second.reference) == ("9", "2.5") and first.id == "svamp-own-1"
    assert task.grade(first, "14 - 5 = 9. The answer is 9.0 books").correct and task.grade(second, "#### 2.50").correct
    assert not task.grade(first, "14 - 5 = 8").correct and not task.grade(second, "2").correct and not task.grade(first, "").correct
