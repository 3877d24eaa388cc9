"""Runs a server so that nothing of it outlives this process.

A stopped SGLang kills its own process tree with SIGKILL, itself included, and one stopped while it
starts leaves its children to themselves. Here the server is a session of its own: a signal reaches
the server once, by us, and when it has ended, whatever is left of its session is killed and reaped.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SECONDS = 30.0  # for running requests to end; SGLang itself waits 15 s for its schedulers
REAP_SECONDS = 10.0  # for killed processes to leave


def run(command: list[str], stop_seconds: float = STOP_SECONDS) -> int:
    """Run `command` to its end; SIGINT, SIGTERM and SIGHUP stop it, a second one at once.

    Returns:
        The exit code for this process: the command's own, 128 + signal if we were told to stop,
        1 if the command was killed by a signal that did not come through us.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    received: list[int] = []
    group = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if group and len(received) > 1:
            _signal_group(group, signal.SIGKILL)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, signal.SIGKILL),
        )
        group = process.pid
        stop_by = None
        while process.poll() is None:
            if received and stop_by is None:
                process.send_signal(signal.SIGTERM)
                stop_by = time.monotonic() + stop_seconds
            if stop_by is not None and time.monotonic() > stop_by:
                _signal_group(group, signal.SIGKILL)
            time.sleep(0.05)
    finally:
        if group:
            _signal_group(group, signal.SIGKILL)
            _reap()
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        return 128 + received[0]
    return process.returncode if process.returncode >= 0 else 1


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)


def _reap() -> None:
    # the killed children were re-parented to us, their subreaper
    deadline = time.monotonic() + REAP_SECONDS
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.02)


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent ends (a `preexec_fn`)."""
    _prctl(PR_SET_PDEATHSIG, signum)


def _prctl(option: int, value: int) -> None:
    # a guard against being killed ourselves; other systems than Linux go without
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
