"""Ends what a launch leaves behind, also when the launcher itself was killed.

Started by `jaxmoe.cli._ranks` with a pipe as its standard input that only the launcher holds open.
When the pipe closes, whatever still lives of the launch is killed: the processes of the sessions
whose numbers came through the pipe, and those that carry the launch's id in their environment. The
first finds a rank that overwrote its environment (a process title does that), the second a
grandchild that opened a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

LAUNCH_ID = "JAXMOE_LAUNCH_ID"
_SECONDS = 10.0


def members(launch_id: str, sessions: set[int]) -> list[int]:
    """The processes of a launch that have not ended."""
    mark = f"{LAUNCH_ID}={launch_id}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end meanwhile, or belong to another user.
        with contextlib.suppress(OSError):
            # Behind the name, which may hold anything: state, parent, process group, session.
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state in "ZX":
                continue
            if int(session) in sessions or mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def main() -> None:
    """Wait for the end of standard input, then kill."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions = {int(line) for line in sys.stdin}
    until = time.monotonic() + _SECONDS
    while (found := members(sys.argv[1], sessions)) and time.monotonic() < until:
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
