"""A few problems written for tests, in the published forms of the public data sets. None of them is from those sets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GSM8K_TEST = (
    {
        "question": "A baker fills 6 trays with 8 rolls each and sells 30 rolls. How many rolls are left?",
        "answer": "The baker makes 6*8 = <<6*8=48>>48 rolls.\nAfter the sale there are 48-30 = <<48-30=18>>18 rolls.\n#### 18",
    },
    {
        "question": "A hall has 25 rows of 40 seats, and 12 more seats stand at the back. How many seats does the hall have?",
        "answer": "The rows have 25*40 = <<25*40=1000>>1000 seats.\nIn all there are 1000+12 = <<1000+12=1012>>1012 seats.\n#### 1,012",
    },
    {
        "question": "At noon it is 4 degrees. By midnight it falls by 9 degrees. How many degrees is it then?",
        "answer": "4-9 = <<4-9=-5>>-5\n#### -5",
    },
)
GSM8K_TRAIN = tuple(
    {
        "question": f"A box holds {n} pens. How many pens do {k} boxes hold?",
        "answer": f"{k} boxes hold {k}*{n} = <<{k}*{n}={k * n}>>{k * n} pens.\n#### {k * n}",
    }
    for n, k in ((3, 4), (5, 6), (7, 2), (9, 3), (11, 5), (8, 8), (12, 7), (6, 9), (10, 4), (13, 2))
)
SVAMP = (
    {
        "ID": "own-1",
        "Body": "A shelf has 14 books. Ida takes 5 of them",
        "Question": "How many books are left?",
        "Equation": "( 14.0 - 5.0 )",
        "Answer": 9.0,
        "Type": "Subtraction",
    },
    {
        "ID": "own-2",
        "Body": "A rope of 5 metres is cut into 2 equal pieces.",
        "Question": "How long is a piece?",
        "Equation": "( 5.0 / 2.0 )",
        "Answer": 2.5,
        "Type": "Common-Division",
    },
)
MATH = tuple(
    {
        "problem": problem,
        "solution": f"{before}$\\boxed{{{answer}}}$.",
        "answer": answer,
        "subject": "Algebra",
        "level": 1,
        "unique_id": name,
    }
    for name, problem, before, answer in (
        ("own/1.json", "What is $\\frac{1}{4}+\\frac{1}{2}$?", "Together they are ", "\\frac{3}{4}"),
        ("own/2.json", "Solve $x^2 = 2$ for positive $x$.", "So x is ", "\\sqrt{2}"),
        ("own/3.json", "For which $x$ is $(x-1)^2 < 4$? Write an interval.", "For x in ", "(-1,3)"),
    )
)
HUMAN_EVAL = (
    {
        "task_id": "Own/0",
        "prompt": 'from typing import List\n\n\ndef evens(numbers: List[int]) -> List[int]:\n    """ Keep the even numbers.\n    """\n',
        "canonical_solution": "    return [number for number in numbers if number % 2 == 0]\n",
        "test": "\ndef check(candidate):\n    assert candidate([1, 2, 4]) == [2, 4]\n    assert candidate([]) == []\n",
        "entry_point": "evens",
    },
    {
        "task_id": "Own/1",
        "prompt": "def half(x):\n    return x / 2\n\n\ndef quarter(x):\n    '''A quarter of x; half is at hand.'''\n",
        "canonical_solution": "    return half(half(x))\n",
        "test": "\ndef check(candidate):\n    assert candidate(8) == 2\n",
        "entry_point": "quarter",
    },
)
MBPP = tuple(
    {
        "task_id": number,
        "text": f"Write a function that adds {number} to a number.",
        "code": f"def add_{number}(x):\r\n  return x + {number}",
        "test_setup_code": "",
        "test_list": [
            f"assert add_{number}(0) == {number}",
            f"assert add_{number}(1) == {number + 1}",
            f"assert add_{number}(-1) == {number - 1}",
        ],
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 11, 12, 601)
)
COUNTDOWN = ({"input": "6,7,8", "output": "50"}, {"input": "3,5,40", "output": "55"})
SUDOKU = "Puzzle,Solution\n1004041020030020,1234341221434321\n1234000021400001,1234341221434321\n"
TEXT = (
    "The boat left in the morning. It had rained all night. Nobody was on the pier! The river was brown and fast. A dog barked. "
    'They rowed to the island. "Are we there?" asked Mia. Her brother did not answer. He looked at the clouds. Then it began to snow.\n'
)


def write_items(directory: Path) -> dict[str, Path]:
    """Write all of them as files in the published forms; the paths by the data set's name."""
    lines: Mapping[str, Any] = {
        "gsm8k_test.jsonl": GSM8K_TEST, "gsm8k_train.jsonl": GSM8K_TRAIN, "math500.jsonl": MATH, "human_eval.jsonl": HUMAN_EVAL,
        "mbpp.jsonl": MBPP, "countdown.jsonl": COUNTDOWN, "gsm_symbolic.jsonl": GSM8K_TEST,
    }  # fmt: skip
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in lines.items()}
    texts |= {"svamp.json": json.dumps(SVAMP, indent=4), "sudoku.csv": SUDOKU, "text.txt": TEXT}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8", newline="")
    return {name.partition(".")[0]: directory / name for name in texts}
