"""What the tasks of arithmetic word problems share: the prompt with worked examples, and the draw of the examples."""

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dllm_toolkit.evaluation.tasks import sources
from dllm_toolkit.evaluation.tasks.base import TaskError

MOST_SHOTS = 32
GSM8K = "openai/gsm8k"
STOPS = ("Question:",)
"""Where a base model that goes on with the next problem is cut off."""
_INSTRUCTION = "Think step by step. Then write the final answer, a number without units, on a last line that begins with ####."
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def check_shots(shots: int) -> None:
    if not 0 <= shots <= MOST_SHOTS:
        raise TaskError(f"shots must be between 0 and {MOST_SHOTS}, got {shots}. It counts worked examples. Write shots: 8.")


def without_calculator(answer: str) -> str:
    """A GSM8K solution without its <<48/2=24>> notes."""
    return _CALCULATOR.sub("", answer)


def final_of(answer: str, row: object) -> str:
    """What stands behind the last ####."""
    before, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise TaskError(f"a solution has no final `#### number`, got {answer[-60:]!r} in {row}. GSM8K's form has one. Repair the file.")
    return final.strip()


def draw(rows: Sequence[Mapping[str, Any]], count: int, seed: int, key: str) -> list[Mapping[str, Any]]:
    """`count` rows, picked by a hash of their text under `key`: the same on every machine, and more of them begin with the fewer."""

    def rank(row: Mapping[str, Any]) -> bytes:
        return blake2b(f"{seed}/{row[key]}".encode(), digest_size=8).digest()

    if count > len(rows):
        raise TaskError(f"shots={count}, but the examples have {len(rows)} rows. Write shots: {len(rows)}.")
    return sorted(rows, key=rank)[:count]


def examples(path: Path | None, shots: int, seed: int, calculator: bool = False) -> list[tuple[str, str]]:
    """Worked examples in GSM8K's form, question and solution, from its training file or from the hub."""
    if shots == 0:
        return []
    rows = sources.load(path, GSM8K, "train", ("question", "answer"), config="main", where="examples")
    drawn = draw(rows, shots, seed, "question")
    return [(row["question"], row["answer"] if calculator else without_calculator(row["answer"])) for row in drawn]


def prompt(question: str, shown: Sequence[tuple[str, str]], chat: bool) -> str:
    """The problem behind worked examples; where there are none, and in a chat, with an instruction that says how to end."""
    worked = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in shown)
    if chat:
        return f"{worked}{'Question: ' if shown else ''}{question}\n\n{_INSTRUCTION}"
    return f"{worked}Question: {question}{'' if shown else chr(10) + _INSTRUCTION}\nAnswer:"
