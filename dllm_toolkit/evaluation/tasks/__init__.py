"""Tasks: problems with prompts and graders. One file a task; what they share stands in base, sources, numbers, word_problems, programs."""

from dllm_toolkit.evaluation.tasks.base import Gap, Grade, Problem, Task, TaskError
from dllm_toolkit.evaluation.tasks.countdown import CountdownTask
from dllm_toolkit.evaluation.tasks.gsm8k import GSM8K
from dllm_toolkit.evaluation.tasks.gsm_symbolic import GSMSymbolic
from dllm_toolkit.evaluation.tasks.human_eval import HumanEval
from dllm_toolkit.evaluation.tasks.infilling import Infilling
from dllm_toolkit.evaluation.tasks.list_operations import ListOperations
from dllm_toolkit.evaluation.tasks.math500 import MATH500
from dllm_toolkit.evaluation.tasks.mbpp import MBPP
from dllm_toolkit.evaluation.tasks.repeated import Repeated
from dllm_toolkit.evaluation.tasks.stories import StoryArithmetic
from dllm_toolkit.evaluation.tasks.sudoku import SudokuTask
from dllm_toolkit.evaluation.tasks.svamp import SVAMP

__all__ = [
    "GSM8K", "MATH500", "MBPP", "SVAMP", "CountdownTask", "GSMSymbolic", "Gap", "Grade", "HumanEval", "Infilling", "ListOperations",
    "Problem", "Repeated", "StoryArithmetic", "SudokuTask", "Task", "TaskError",
]  # fmt: skip
