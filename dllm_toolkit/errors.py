"""The base class of every error that a user can cause.

The command line prints a `ToolkitError` as one message and exits with code 2; anything else is a defect of
the program and keeps its traceback. All of them are `ValueError`s, so library users need no special import.
"""

from __future__ import annotations


class ToolkitError(ValueError):
    """What the user gave cannot work; the message says what is wrong, why, and what to write instead."""


class SaidElsewhere(ToolkitError):
    """An error that another process of the run prints: this one ends without repeating it."""
