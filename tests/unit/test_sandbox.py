"""The sandbox: what a program may do, and that everything else is a failed outcome. Quick and harmless, also as root."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import sandbox, sandbox_guard
from dllm_toolkit.evaluation.sandbox import Limits, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are held on Linux only")
QUICK = Limits(seconds=1, memory=256, file_size=1)
BOTH = pytest.mark.parametrize("landlock", [True, False], ids=["landlock", "no writing"])


def test_right_and_wrong_programs() -> None:
    program = "def double(x):\n    return 2 * x"
    assert run(program, ["assert double(2) == 4", "assert double(0) == 0"], QUICK).status == "passed"
    outcome = run(program, ["assert double(2) == 4", "assert double(2) == 5", "double(None)"], QUICK)
    assert outcome.status == "failed" and outcome.passed == (True, False, False) and outcome.message.startswith("AssertionError")
    broken = run("def double(x) return 2", ["assert double(2) == 4"], QUICK)
    assert (broken.status, broken.passed) == ("error", (False,)) and broken.message.startswith("SyntaxError")
    assert run("", ["pass"], QUICK).right


@BOTH
def test_a_fork_bomb(landlock: bool) -> None:
    outcome = run("import os\nwhile True:\n    os.fork()", ["pass"], QUICK, landlock=landlock)
    assert outcome.status == "error" and "BlockingIOError" in outcome.message


def test_no_process_by_any_way() -> None:
    for way in (
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "import ctypes; assert ctypes.CDLL(None).system(b'true') == 0",
    ):
        assert run(way, ["pass"], QUICK).status == "error", way


def test_threads_are_no_processes() -> None:
    program = "import threading\nfound = []\nthread = threading.Thread(target=found.append, args=(3,))\nthread.start()\nthread.join()"
    assert run(program, ["assert found == [3]"], QUICK).right


def test_an_endless_loop() -> None:
    outcome = run("while True:\n    pass", ["pass"], QUICK)
    assert outcome.status == "time" and outcome.passed == (False,)


def test_a_loop_that_catches_everything() -> None:
    program = (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    try:\n        while True: pass\n    except: pass"
    )
    assert run(program, ["pass"], QUICK).status == "time"


def test_sleeping_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = sandbox._finish
    monkeypatch.setattr(sandbox, "_finish", lambda job, folder, seconds: patient(job, folder, 1.0))
    started = time.monotonic()
    outcome = run("import time\ntime.sleep(1000)", ["pass"], QUICK)
    assert outcome.status == "time" and time.monotonic() - started < 60


@BOTH
def test_ten_gigabytes(landlock: bool) -> None:
    for program in ("data = bytearray(10 << 30)", "data = []\nwhile True:\n    data.append(bytes(1 << 24))", "x = '9' * (10 << 30)"):
        outcome = run(program, ["pass"], QUICK, landlock=landlock)
        assert outcome.status == "error" and "MemoryError" in outcome.message


@BOTH
def test_writing_outside_the_folder(landlock: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("as it was")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    for program in (
        f"open({str(victim)!r}, 'w').write('changed')",
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        f"import os; os.unlink({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, {str(tmp_path / 'moved')!r})",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import os; os.chmod({str(victim)!r}, 0)",
        f"import os; os.utime({str(victim)!r}, (0, 0))",
        f"import os; os.symlink({str(tmp_path)!r}, 'way'); open('way/new.txt', 'w')",
        f"import os; os.link({str(victim)!r}, 'own'); open('own', 'w').write('changed')",
        "open('../new-beside-the-folder.txt', 'w')",
        "open('/dev/shm/dllm-toolkit-test', 'w')",
    ):
        outcome = run(program, ["pass"], QUICK, landlock=landlock)
        assert outcome.status == "error" and "Error" in outcome.message, program
    assert victim.read_text() == "as it was" and [item.name for item in tmp_path.iterdir()] == ["victim.txt"]
    assert victim.stat().st_mtime > 1e9 and victim.stat().st_mode & 0o777 == 0o666


def test_writing_inside_the_folder() -> None:
    steps = "os.mkdir('d')", "open('d/a', 'w').write('1')", "os.rename('d/a', 'b')", "text = open('b').read()", "os.unlink('b')"
    program = "\n".join(("import os", *steps))
    confined = run(program, ["assert text == '1'"], QUICK)
    # Where the kernel cannot keep writing inside, there is none.
    assert confined.right if _has_landlock() else confined.status == "error"
    assert run(program, ["assert text == '1'"], QUICK, landlock=False).status == "error"


def _has_landlock() -> bool:
    return sandbox_guard.libc().syscall(444, None, 0, 1) >= 3


def test_a_file_that_is_too_large() -> None:
    program = "with open('large', 'wb') as stream:\n    for _ in range(64):\n        stream.write(bytes(1 << 20))"
    outcome = run(program, ["pass"], QUICK)
    assert outcome.status == "error" and "Error" in outcome.message


@BOTH
def test_a_network_call(landlock: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.01)
        port = server.getsockname()[1]
        for program in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)",
            f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}', timeout=1)",
            "import socket; socket.socket(socket.AF_UNIX)",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        ):
            outcome = run(program, ["pass"], QUICK, landlock=landlock)
            assert outcome.status == "error" and "not permitted" in outcome.message, program
        with pytest.raises(TimeoutError):
            server.accept()


def test_nobody_else_is_signalled() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for program in (
            "import os; os.kill(os.getppid(), 9)",
            "import os; os.kill(-1, 9)",
            f"import os; os.kill({bystander.pid}, 9)",
            "import os; os.killpg(os.getpgid(os.getppid()), 9)",
            f"import signal, os; signal.pidfd_send_signal(os.pidfd_open({bystander.pid}), 9)",
        ):
            assert run(program, ["pass"], QUICK).status == "error", program
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    "leave",
    ["os._exit(0)", "os.abort()", "os.kill(os.getpid(), 9)", "exec('def f(): f()\\nimport sys\\nsys.setrecursionlimit(10**9)\\nf()')"],
)
def test_leaving_early_is_no_success(leave: str) -> None:
    outcome = run(f"import os\n{leave}", ["pass"], QUICK)
    assert outcome.status in ("ended", "error", "time") and outcome.passed == (False,)


def test_exit_and_broken_errors_are_failures() -> None:
    assert run("import sys; sys.exit(0)", ["pass"], QUICK).status == "error"
    assert run("raise KeyboardInterrupt", ["pass"], QUICK).status == "error"
    nasty = "class Nasty(Exception):\n    def __str__(self): raise self\nraise Nasty"
    assert run(nasty, ["pass"], QUICK).message == "Nasty"
    assert run("input()", ["pass"], QUICK).status == "error"


def test_a_forged_or_flooded_verdict() -> None:
    verdict = b'{"started": true, "passed": [true], "message": ""}'
    write = "import os\nfor place in range(3, 20):\n    try: os.write(place, {!r})\n    except OSError: pass\n"
    forge = write.format(verdict) + "os._exit(0)"
    assert run(forge, ["pass"], QUICK).status == "ended"
    flood = (
        "import os\nwhile True:\n    for place in range(3, 20):\n        try: os.write(place, bytes(9999))\n        except OSError: pass"
    )
    assert run(flood, ["pass"], QUICK).status in ("ended", "time")


def test_what_it_prints_is_nobodys() -> None:
    assert run("import sys\nfor _ in range(9999): print('x' * 99); print('y', file=sys.stderr)", ["pass"], QUICK).right


def test_the_same_program_gets_the_same_verdict() -> None:
    program = "import random\nvalue = (random.random(), list({'a', 'b', 'c', 'd'}))\nraise ValueError(value)"
    assert run(program, [], QUICK).message == run(program, [], QUICK).message


def test_no_secrets_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_TOKEN", "do not tell")
    program = "import os\nassert 'OWN_TOKEN' not in os.environ\nassert os.environ['HOME'] == os.getcwd()"
    assert run(program, [], QUICK).right
    assert run(f"open('/proc/{os.getpid()}/environ').read()", [], QUICK).status == "error"


def test_the_folder_is_gone_afterwards() -> None:
    outcome = run("import os\nraise ValueError(os.getcwd())", [], QUICK)
    folder = outcome.message.partition(": ")[2]
    assert "dllm-sandbox-" in folder and not Path(folder).exists()


def test_a_machine_that_cannot_hold_programs_runs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A guard without its filter must not run anything."""
    crippled = tmp_path / "guard.py"
    source = Path(sandbox_guard.__file__).read_text()
    assert source.count("if c.prctl(22, 2,") == 1
    crippled.write_text(source.replace("if c.prctl(22, 2,", "if c.prctl(22, 77,"))
    monkeypatch.setattr(sandbox, "_GUARD", crippled)
    with pytest.raises(ToolkitError, match="cannot be held"):
        run("raise SystemExit", ["pass"], QUICK)
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(ToolkitError, match="Linux only"):
        run("", [], QUICK)


def test_limits_are_checked() -> None:
    for bad in ({"seconds": 0}, {"memory": 1}, {"file_size": 0}):
        with pytest.raises(ToolkitError, match="must be at least"):
            Limits(**bad)
    sandbox.require()


def test_numbers_of_calls_are_the_kernels_own() -> None:
    """The two tables against the headers of this machine, where they are installed."""
    headers = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
    compared = 0
    for column, header in enumerate(headers):
        if not header.is_file():
            continue
        lines = (line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR"))
        known = {
            words[1].removeprefix("__NR3264_").removeprefix("__NR_"): words[2] for words in lines if len(words) == 3 and words[2].isdigit()
        }
        for name, numbers in sandbox_guard.CALLS.items():
            if name in known:
                compared += 1
                assert numbers[column] == int(known[name]), (name, header)
    assert compared > 100 or not any(header.is_file() for header in headers)


def test_the_filter_is_well_formed() -> None:
    for machine in sandbox_guard.ARCHITECTURES:
        for confined in (True, False):
            code = sandbox_guard.program(machine, confined, 4711)
            assert len(code) % 8 == 0 and len(code) // 8 < 4096
            jumps = [(code[start + 2], code[start + 3]) for start in range(0, len(code), 8)]
            assert all(index + 1 + max(jump) < len(jumps) for index, jump in enumerate(jumps) if any(jump))
