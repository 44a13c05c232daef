"""Processes that measure together: who is there, and how an error of one ends all. What they write is in test_interruptions.py."""

import pytest

from dllm_toolkit import cli
from dllm_toolkit.errors import SaidElsewhere, ToolkitError
from dllm_toolkit.evaluation.processes import ALONE, ProcessError, Processes, announced


def test_alone_nothing_is_sent() -> None:
    assert announced() == ALONE and ALONE.share(1) == 1 and ALONE.gather(2) == [2]
    with pytest.raises(ToolkitError, match="own words"), ALONE.together():
        raise ToolkitError("own words")


def test_an_error_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, "the disk is full"] if self.first else [])
    monkeypatch.setattr(Processes, "share", lambda self, value: True)
    with pytest.raises(ProcessError, match="process 1 of 2: the disk is full"), Processes(0, 2, 0, 2).together():
        pass
    with pytest.raises(SaidElsewhere), Processes(1, 2, 1, 2).together():
        pass


@pytest.mark.parametrize("wrong", [{"RANK": "2"}, {"RANK": "x"}, {"RANK": "0", "LOCAL_WORLD_SIZE": "3"}, {}])
def test_what_no_launcher_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", **wrong}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="torchrun"):
        announced()


def test_commands_for_one_process_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["harness", "nowhere.yaml"]) == 2
    assert "harness works in one process, got 2" in capsys.readouterr().err
