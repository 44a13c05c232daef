"""The inside of the sandbox: run as a script in a process of its own, never imported by the package (see sandbox.py).

    python -s -P -B sandbox_guard.py JOB.json

It gives up, in this order, everything that a graded program has no use for, and only then runs the program:

    limits      address space, processor seconds, size of a file, open files, no core files (setrlimit)
    rights      all capabilities, and the way to get any (capset, no_new_privs)
    writing     Landlock: nothing outside the working folder may be written, made, renamed or removed. A kernel without it: seccomp
                refuses to open any file for writing, inside the folder too
    calls       seccomp: no socket, no new process (threads are allowed), no other program, no signal to another process, nothing that
                changes owners, modes, clocks, mounts or limits of others

All of that is the kernel's work and needs neither root nor namespaces, so it holds inside containers. If any part cannot be had, the
program is not run. One JSON line goes to the first standard output; the program's own output goes nowhere.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types

# Numbers of (x86_64, aarch64); None: the machine does not have the call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "accept": (43, 202), "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bind": (49, 200),
    "bpf": (321, 280), "chmod": (90, None), "chown": (92, None), "chroot": (161, 51), "clock_adjtime": (305, 266),
    "clock_settime": (227, 112), "clone": (56, 220), "clone3": (435, 435), "connect": (42, 203), "creat": (85, None),
    "delete_module": (176, 106), "execve": (59, 221), "execveat": (322, 281), "fanotify_init": (300, 262), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "fchown": (93, 55), "fchownat": (260, 54), "finit_module": (313, 273),
    "fork": (57, None), "fremovexattr": (199, 16), "fsconfig": (431, 431), "fsetxattr": (190, 7), "fsmount": (432, 432),
    "fsopen": (430, 430), "fspick": (433, 433), "futimesat": (261, None), "init_module": (175, 105), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioperm": (173, None), "iopl": (172, None), "ioprio_set": (251, 30),
    "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104), "keyctl": (250, 219), "kill": (62, 129),
    "lchown": (94, None), "link": (86, None), "linkat": (265, 37), "listen": (50, 201), "lremovexattr": (198, 15), "lsetxattr": (189, 6),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "migrate_pages": (256, 238), "mkdir": (83, None), "mkdirat": (258, 34),
    "mknod": (133, None), "mknodat": (259, 33), "modify_ldt": (154, None), "mount": (165, 40), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "move_pages": (279, 239), "mq_open": (240, 180), "mq_unlink": (241, 181), "msgget": (68, 186),
    "name_to_handle_at": (303, 264), "open": (2, None), "open_by_handle_at": (304, 265), "open_tree": (428, 428), "openat": (257, 56),
    "openat2": (437, 437), "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pivot_root": (155, 41), "prlimit64": (302, 261), "process_madvise": (440, 440),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "reboot": (169, 142), "removexattr": (197, 14), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "request_key": (249, 218), "rmdir": (84, None), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "semget": (64, 190), "sendmmsg": (307, 269), "sendmsg": (46, 211), "sendto": (44, 206),
    "setdomainname": (171, 162), "sethostname": (170, 161), "setns": (308, 268), "setpriority": (141, 140), "settimeofday": (164, 170),
    "setxattr": (188, 5), "shmget": (29, 194), "socket": (41, 198), "socketpair": (53, 199), "swapoff": (168, 225), "swapon": (167, 224),
    "symlink": (88, None), "symlinkat": (266, 36), "syslog": (103, 116), "tgkill": (234, 131), "tkill": (200, 130), "truncate": (76, 45),
    "umount2": (166, 39), "unlink": (87, None), "unlinkat": (263, 35), "unshare": (272, 97), "userfaultfd": (323, 282),
    "utime": (132, None), "utimensat": (280, 88), "utimes": (235, None), "vfork": (58, None), "vhangup": (153, 58),
}  # fmt: skip
# Only where Landlock cannot keep writing inside the folder.
WRITING = (
    "creat", "link", "linkat", "mkdir", "mkdirat", "mknod", "mknodat", "rename", "renameat", "renameat2", "rmdir", "symlink", "symlinkat",
    "truncate", "unlink", "unlinkat",
)  # fmt: skip
BY_ARGUMENT = ("clone", "kill", "tgkill", "prlimit64", "open", "openat")
ABSENT = ("clone3", "openat2")
"""Calls with arguments behind a pointer, where a filter cannot look: said to be unknown, so that libraries fall back to the older call."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
EPERM, EAGAIN, EACCES, ENOSYS = 1, 11, 13, 38


class Unheld(Exception):
    """A guard that this machine does not offer; the program must not run."""


def limit(job: dict) -> None:
    """Resource limits, which the processes of this one cannot raise again."""
    seconds, memory, files = job["seconds"], job["memory"] << 20, job["file_size"] << 20
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, files, files),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))


def libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def drop_rights(c: ctypes.CDLL) -> None:
    """No capabilities, even for root, and none to be had."""
    if c.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise Unheld("no_new_privs is not available")
    for capability in range(64):
        if c.prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP; fails beyond the last capability, and without the right to drop any
            break
    header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if c.capset(header, data) != 0:
        raise Unheld(f"capabilities cannot be dropped: {os.strerror(ctypes.get_errno())}")


def confine_writing(c: ctypes.CDLL, folder: str) -> bool:
    """Landlock: write below `folder` and to /dev/null only. False where the kernel has no Landlock that knows truncation (before 6.2)."""
    abi = c.syscall(444, None, 0, 1)
    if abi < 3:
        return False
    # write_file, remove_dir, remove_file, make_* (8), refer, truncate: everything but reading and executing.
    writing = (1 << 1) | sum(1 << bit for bit in range(4, 15))
    network = 0b11 if abi >= 4 else 0
    scoped = 0b11 if abi >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("QQQ", writing, network, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = c.syscall(444, attributes, len(attributes), 0)
    if ruleset < 0:
        raise Unheld(f"Landlock is there but refuses: {os.strerror(ctypes.get_errno())}")
    for path, allowed in ((folder, writing), (os.devnull, (1 << 1) | (1 << 14))):
        target = os.open(path, os.O_PATH)
        if c.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, target), 0) != 0:
            raise Unheld(f"Landlock does not take {path}: {os.strerror(ctypes.get_errno())}")
        os.close(target)
    if c.syscall(446, ruleset, 0) != 0:
        raise Unheld(f"Landlock does not hold: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)
    return True


def program(machine: str, confined: bool, pid: int) -> bytes:
    """The seccomp filter, instructions of 8 bytes."""
    column, architecture = ARCHITECTURES[machine]

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value & 0xFFFFFFFF)

    def load(offset: int) -> bytes:
        return step(0x20, offset)

    def answer(error: int) -> bytes:
        return step(0x06, 0x00050000 | error)

    def argument(index: int) -> bytes:
        return load(16 + 8 * index)  # its lower half; both machines are little-endian

    allow, die = step(0x06, 0x7FFF0000), step(0x06, 0x80000000)
    equal, greater, bits = 0x15, 0x35, 0x45
    parts = [load(4), step(equal, architecture, 1, 0), die, load(0)]
    if machine == "x86_64":
        parts += [step(greater, 0x40000000, 0, 1), answer(EPERM)]  # the x32 numbers of the same calls
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for name, numbers in CALLS.items():
        number = numbers[column]
        if number is None or (name in WRITING or name in ("open", "openat")) and confined:
            continue
        if name == "clone":  # a thread is no process
            body = [argument(0), step(bits, 0x00010000, 0, 1), allow, answer(EAGAIN)]
        elif name in ("kill", "tgkill"):  # to itself: abort() does so
            body = [argument(0), step(equal, pid, 0, 1), allow, answer(EPERM)]
        elif name == "prlimit64":
            body = [argument(0), step(equal, 0, 0, 1), allow, answer(EPERM)]
        elif name in ("open", "openat"):
            body = [argument(1 if name == "open" else 2), step(bits, writes, 0, 1), answer(EACCES), allow]
        else:
            error = ENOSYS if name in ABSENT else EAGAIN if name in ("fork", "vfork") else EACCES if name in WRITING else EPERM
            body = [answer(error)]
        parts += [step(equal, number, 0, len(body)), *body]
    return b"".join([*parts, allow])


def filter_calls(c: ctypes.CDLL, code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    held = Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if c.prctl(22, 2, ctypes.byref(held), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise Unheld(f"seccomp is not available: {os.strerror(ctypes.get_errno())}")


def guard(job: dict) -> None:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise Unheld(f"calls of {machine} machines are not known here")
    c = libc()
    limit(job)
    drop_rights(c)
    confined = job["landlock"] and confine_writing(c, os.getcwd())
    filter_calls(c, program(machine, confined, os.getpid()))


def told(problem: BaseException) -> str:
    try:
        return f"{type(problem).__name__}: {problem}"[:300]
    except BaseException:  # an error whose text is an error
        return type(problem).__name__[:300]


def run(job: dict) -> dict:
    """Run the program and then each check; a check is passed if it raises nothing."""
    module = types.ModuleType("solution")  # not __main__: a solution's own demonstration is not wanted
    sys.modules["solution"] = module
    try:
        exec(compile(job["program"], "<solution>", "exec"), module.__dict__)
    except BaseException as problem:
        return {"started": False, "passed": [False] * len(job["checks"]), "message": told(problem)}
    passed, message = [], ""
    for check in job["checks"]:
        try:
            exec(compile(check, "<check>", "exec"), module.__dict__)
            passed.append(True)
        except BaseException as problem:
            passed.append(False)
            message = message or told(problem)
    return {"started": True, "passed": passed, "message": message}


def main(path: str) -> None:
    with open(path, encoding="utf-8") as stream:
        job = json.load(stream)
    os.unlink(path)
    secret = job.pop("secret")
    result, quiet = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import random

    random.seed(0)  # the same program gets the same verdict every time
    try:
        guard(job)
    except (Unheld, OSError, ValueError) as problem:
        verdict = {"unheld": str(problem)}
    else:
        verdict = run(job)
    # Whoever ended early, with exit() or a crash, could not write the secret.
    os.write(result, json.dumps({"secret": secret, **verdict}).encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
