"""Denies Unix sockets to a process and to all that it starts, by a system call filter (seccomp).

Landlock does not restrict connections to sockets with a path, for example those of Docker, the session bus or an SSH
agent. Pairs of connected sockets stay allowed, because they lead to no other process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import sys
from functools import cache
from typing import Any

PR_SET_NO_NEW_PRIVS = 38
SET_MODE_FILTER = 1
SPEC_ALLOW = 1 << 2
"""Without this flag, a filter on Linux before 5.16 also disables speculation, which slows down training."""
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
LOAD, MASK, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24
"""Offsets in `struct seccomp_data`. For arguments, the low half on a little-endian machine."""
SOCK_TYPE = 0xF
X32 = 0x40000000
"""Set in the numbers of x32's system calls, which would otherwise bypass the filter."""
IO_URING_SETUP = 425
"""io_uring can open sockets without a system call for each."""
ARCHITECTURES = {"x86_64": (0xC000003E, 317, 41, 53), "aarch64": (0xC00000B7, 277, 198, 199)}
"""By machine name: AUDIT_ARCH_*, and the system call numbers of seccomp, socket and socketpair."""


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


@cache
def is_available() -> bool:
    """Return whether this kernel has such filters and Lorry knows the system calls of this processor."""
    if sys.platform != "linux" or sys.maxsize < 2**32 or platform.machine() not in ARCHITECTURES:
        return False
    _seccomp(None)  # EFAULT if the kernel knows filters and SPEC_ALLOW
    return ctypes.get_errno() == errno.EFAULT


def deny_unix_sockets() -> None:
    """Apply the filter to this process. Needs no privilege and can't be undone. Raises OSError."""
    instructions = _instructions(*ARCHITECTURES[platform.machine()])
    array = (_Instruction * len(instructions))(*instructions)
    if _libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or _seccomp(_Program(len(array), array)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _instructions(architecture: int, _: int, open_socket: int, open_pair: int) -> list[tuple[int, int, int, int]]:
    """Return the filter's instructions. Only stream and seqpacket pairs are allowed, because a datagram socket of a
    pair could be connected to a path."""
    to_allow, to_deny, to_kill = 14, 15, 16
    program = [
        (LOAD, ARCHITECTURE),
        (EQUAL, architecture, 2, to_kill),
        (LOAD, NUMBER),
        (AT_LEAST, X32, to_deny, 4),
        (EQUAL, IO_URING_SETUP, to_deny, 5),
        (EQUAL, open_socket, 8, 6),
        (EQUAL, open_pair, 10, 7),
        (RETURN, ALLOW),
        (LOAD, FIRST_ARGUMENT),
        (EQUAL, socket.AF_UNIX, to_deny, to_allow),
        (LOAD, SECOND_ARGUMENT),
        (MASK, SOCK_TYPE),
        (EQUAL, socket.SOCK_STREAM, to_allow, 13),
        (EQUAL, socket.SOCK_SEQPACKET, to_allow, to_deny),
        (RETURN, ALLOW),
        (RETURN, DENY),
        (RETURN, KILL),
    ]
    found: list[tuple[int, int, int, int]] = []
    for at, (code, k, *jumps) in enumerate(program):
        yes, no = jumps or (at + 1, at + 1)
        found.append((code, yes - at - 1, no - at - 1, int(k)))
    return found


def _seccomp(program: _Program | None) -> int:
    call = ARCHITECTURES[platform.machine()][1]
    pointer = None if program is None else ctypes.byref(program)
    return int(_libc().syscall(call, ctypes.c_uint(SET_MODE_FILTER), ctypes.c_uint(SPEC_ALLOW), pointer))


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
