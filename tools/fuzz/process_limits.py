"""Limits of a process that tries one damaged file, and how such a process ended.

What counts against a file is the time that the processor spent on it: on a busy machine the clock runs on while
nothing is computed. The clock has a limit too, a generous one, for a process that waits for ever.
"""

from __future__ import annotations

import os
import resource
import signal

BYTES = 16 << 30  # of address space
WALL_SECONDS = 1800  # a trial of files (qap_gguf.files.trial) may take 600 of them in a child of its own


def bound(cpu_seconds: int, wall_seconds: int = WALL_SECONDS) -> None:
    """Limit this process, not those that it starts later: they get the same limits, counted anew.

    Beyond them it ends by SIGXCPU or SIGALRM. There are no core dumps.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]  # stays: at the hard limit the system sends SIGKILL
    most = cpu_seconds if hard == resource.RLIM_INFINITY else min(cpu_seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
    signal.alarm(wall_seconds)


def ending(status: int) -> str:
    """The status that os.waitpid gave, in words.

    Example:
        >>> ending(signal.SIGALRM)
        'SIGALRM, too long by the clock'
    """
    if not os.WIFSIGNALED(status):
        return f"exit status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    names = {int(each): each.name for each in signal.Signals}
    name = names.get(number, f"signal {number}")
    if number == signal.SIGXCPU:
        return name + ", too much processor time"
    return name + ", too long by the clock" if number == signal.SIGALRM else name
