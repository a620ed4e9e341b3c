"""Processes that are killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable


def killed(work: Callable[[], object], seed: int, longest: float = 0.1) -> None:
    """Let a child do its work, and kill it after a random time of at most `longest` seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)  # it came to an end before it was killed, which its work must not
    time.sleep(random.Random(seed).uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the work ended by itself"
