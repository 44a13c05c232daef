"""Puzzles that are public test problems, as digests: what a generator draws is compared with them, so that it never repeats one.

public_puzzles.json holds 32-bit digests of the d1 test sets (arXiv 2504.12216: 256 Countdown problems with three numbers, 500 Sudoku
puzzles), not the problems. A chance match with a digest only makes the generator draw again.
"""

from functools import cache
from hashlib import blake2b
from pathlib import Path


def digest(key: str) -> str:
    return blake2b(key.encode(), digest_size=4).hexdigest()


@cache
def _known() -> frozenset[str]:
    import json

    return frozenset(json.loads(Path(__file__).with_name("public_puzzles.json").read_text(encoding="utf-8"))["digests"])


def is_public(key: str) -> bool:
    """Whether the puzzle with this key (see countdown.key_of, sudoku.key_of) is a public test problem."""
    return digest(key) in _known()
