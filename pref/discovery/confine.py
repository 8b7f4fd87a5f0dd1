"""Shuts the present process in: from then on it can compute, and read and write what is open, and
nothing else.

No text of a model's is ever executed (form.py). This is the second wall, for the case that the
first has a hole. Each layer is asked for by itself; where the system refuses one, the others stand:

    rlimits             no further process, no byte in a file, no memory beyond MEMORY more
    no new privileges   Linux: nothing that it might execute has more rights than itself
    no network          Linux: a network namespace of its own, without any interface
    Landlock            Linux 5.13: no path can be opened, created, removed or renamed
    no new files        no file descriptor, and so no socket, beyond those that are open
    seccomp             Linux on x86-64 and aarch64: only the system calls that computing needs

    layers = usable()              early: what this system grants, tried in children
    ...                            imports, files: whatever will be needed
    held = confine(layers)         for good

Standard library only, by ctypes; root is not needed. Landlock and the namespace bind the calling
thread alone, so other threads must not have been started yet; seccomp binds all of them.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable, Sequence

MEMORY = 1 << 30  # bytes of address space, beyond what is in use

# Numbers of the kernel's interface, from its headers.
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # on every architecture
LANDLOCK_VERSION = 1  # flag: return the ABI's version
# Rights of files that an ABI of Landlock knows, of the network and of signals: handled, and then
# granted by no rule.
LANDLOCK_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of bits; newer ABIs: as 5
LANDLOCK_NET_ABI, LANDLOCK_NET = 4, 0b11
LANDLOCK_SCOPE_ABI, LANDLOCK_SCOPE = 6, 0b11
SECCOMP_SET_MODE_FILTER, SECCOMP_TSYNC = 1, 1
SECCOMP_KILL, SECCOMP_ALLOW, SECCOMP_ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # classic BPF: of 32-bit words
NUMBER_AT, ARCHITECTURE_AT = 0, 4  # bytes, in the kernel's struct seccomp_data

# Name -> number, x86-64 and aarch64: memory, time, threads that exist, signals, what is open, the
# end. There is no open, socket, clone, execve, kill, unlink, ptrace among them. `fstat` is needed
# by readers of what is open; `setitimer` is the worker's time limit.
SYSTEM_CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "rseq": (334, 293),
}
# Machine -> (AUDIT_ARCH_*, column of SYSTEM_CALLS, number of `seccomp`).
MACHINES = {
    "x86_64": (0xC000003E, 0, 317),
    "aarch64": (0xC00000B7, 1, 277),
    "arm64": (0xC00000B7, 1, 277),
}


def usable(without: Sequence[str] = ()) -> list[str]:
    """The layers that this system grants, each tried in a child of its own: a system may also end
    a process that asks. Call it before there are threads. without: names of layers to leave out.
    """
    return [name for name, layer in LAYERS.items() if name not in without and survives(layer)]


def survives(layer: Callable[[], str]) -> bool:
    """Whether a child that asks for `layer` gets it, and lives on."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            layer()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def confine(layers: Sequence[str]) -> list[str]:
    """Shut this process in by the `layers` of that name. Returns those that hold, in words, e.g.
    ["rlimits", "no new privileges", "no network", "Landlock 7", "no new files", "seccomp"].
    """
    held = []
    for name, layer in LAYERS.items():
        if name in layers:
            try:
                held.append(layer())
            except OSError:
                continue
    return held


def refuse_privileges() -> str:
    libc().prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    check(libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return "no new privileges"


def leave_network() -> str:
    """A user namespace gives the right to a network namespace; root has it without."""
    try:
        check(libc().unshare(CLONE_NEWUSER | CLONE_NEWNET))
    except OSError:
        check(libc().unshare(CLONE_NEWNET))
    return "no network"


def restrict_paths() -> str:
    """Landlock, without a rule. The ruleset has a size for every version of the ABI."""
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError(errno.EBUSY, "Landlock binds one thread, and there are others")
    version = system_call(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    fields = [(1 << LANDLOCK_FILE_RIGHTS.get(version, 16)) - 1]
    if version >= LANDLOCK_NET_ABI:
        fields.append(LANDLOCK_NET)
    if version >= LANDLOCK_SCOPE_ABI:
        fields.append(LANDLOCK_SCOPE)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules = system_call(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        system_call(LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return f"Landlock {version}"


def limit_resources() -> str:
    """Memory as in use now and MEMORY more, no further process, no byte in a file, no core dump."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        set_limit("RLIMIT_AS", pages * resource.getpagesize() + MEMORY)
    for name in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NPROC"):
        set_limit(name, 0)
    return "rlimits"


def open_nothing() -> str:
    """What is open stays so; not even a socket is added."""
    set_limit("RLIMIT_NOFILE", 0)
    return "no new files"


def set_limit(name: str, most: int) -> None:
    number = getattr(resource, name)
    _, hard = resource.getrlimit(number)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(number, (most, most))
    except ValueError as error:  # as the module words some refusals of the system
        raise OSError(errno.EPERM, str(error)) from None


def filter_system_calls() -> str:
    """seccomp, for every thread of the process."""
    if sys.platform != "linux" or sys.maxsize < 2**32 or platform.machine() not in MACHINES:
        raise OSError(errno.ENOSYS, "no table of system calls for this machine")
    program = filter_program(platform.machine())
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, and where they are
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    number = MACHINES[platform.machine()][2]
    if system_call(number, SECCOMP_SET_MODE_FILTER, SECCOMP_TSYNC, header) != 0:
        raise OSError(errno.ESRCH, "a thread could not be bound")
    return "seccomp"


def filter_program(machine: str) -> bytes:
    """The filter as classic BPF. A call of another architecture ends the process, one that is in
    SYSTEM_CALLS passes, every other one fails with EPERM.
    """
    architecture, column, _ = MACHINES[machine]
    numbers = [row[column] for row in SYSTEM_CALLS.values()]
    code = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, SECCOMP_KILL),
        (LOAD, 0, 0, NUMBER_AT),
        # If equal, jump behind the remaining comparisons and the refusal.
        *((JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (RETURN, 0, 0, SECCOMP_ERRNO | errno.EPERM),
        (RETURN, 0, 0, SECCOMP_ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def libc() -> ctypes.CDLL:
    """The C library. Raises OSError where there is no Linux behind it."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "Linux only")
    return ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def system_call(number: int, *values: int | bytes | None) -> int:
    """A system call by its number. Raises OSError."""
    call = libc().syscall
    call.restype = ctypes.c_long
    kinds = [ctypes.c_long if isinstance(value, int) else ctypes.c_char_p for value in values]
    return check(call(ctypes.c_long(number), *(kind(v) for kind, v in zip(kinds, values))))


# In the order in which they are asked for: each may take away what one before it needs.
LAYERS: dict[str, Callable[[], str]] = {
    "rlimits": limit_resources,
    "no new privileges": refuse_privileges,
    "no network": leave_network,
    "Landlock": restrict_paths,
    "no new files": open_nothing,
    "seccomp": filter_system_calls,
}
