"""The ranks of a launch on this host: starting them, watching them, ending all of them."""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType, TracebackType

from jaxmoe.cli._output import Output
from jaxmoe.cli._reaper import LAUNCH_ID

TIMEOUT_CODE = 124  # of timeout(1)
_TICK = 0.05
_DRAIN_SECONDS = 2.0
_KILL_SECONDS = 10.0
# What a terminal or a scheduler sends, and what the ranks get for it.
_PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


def say(text: str) -> None:
    """A line of the launcher's own."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def as_exit_code(returncode: int) -> int:
    """A shell's exit code for what `Popen` returns: 128 and the number for a signal."""
    return returncode if returncode >= 0 else 128 - returncode


def how_it_ended(returncode: int | None) -> str:
    """The same for a reader."""
    if returncode is None:
        return "does not end, not even by SIGKILL: it hangs in the kernel, as in a GPU's driver"
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


class Ranks:
    """Running ranks; a context manager that leaves none of their processes behind.

    Nor does it when this process is killed: see `jaxmoe.cli._reaper`.
    """

    def __init__(self, output: Output, grace: float) -> None:
        """grace: seconds from the signal that asks a rank to end to the one that ends it."""
        self._output = output
        self._grace = grace
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._launch_id = secrets.token_hex(8)
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "jaxmoe.cli._reaper", self._launch_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._code: int | None = None  # set once the ranks are being ended
        self._failed: int | None = None
        self._kill_at = 0.0
        self._signals: list[signal.Signals] = []
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Ranks:
        for number in _PASSED_ON:
            # One that is ignored, as by nohup, stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._reap()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signals.append(signal.Signals(number))

    def start(self, rank: int, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start one rank, in a session of its own, so that Ctrl-C reaches it through us alone."""
        process = subprocess.Popen(
            command,
            env=environment | {LAUNCH_ID: self._launch_id},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._processes[rank] = process
        assert self._reaper.stdin and process.stdout and process.stderr
        try:
            self._reaper.stdin.write(b"%d\n" % process.pid)
            self._reaper.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError("launch: the process that cleans up behind it has ended") from None
        self._output.add(rank, process.stdout, process.stderr)

    def watch(self, timeout: float | None) -> int:
        """Wait until all ranks have ended, ending them when one fails; returns the exit code."""
        until = None if timeout is None else time.monotonic() + timeout
        while any(process.poll() is None for process in self._processes.values()):
            self._output.pump(_TICK)
            self._look_for_failures()
            self._heed_signals()
            if until is not None and time.monotonic() > until and self._code is None:
                say(f"not done after {timeout:g} seconds: ending all ranks")
                self._end(signal.SIGTERM, TIMEOUT_CODE)
            if self._code is not None and time.monotonic() > self._kill_at:
                self._signal(signal.SIGKILL)
                break
        self._reap()
        self._look_for_failures()
        self._output.drain(_DRAIN_SECONDS)
        self._report()
        return self._code or 0

    def _look_for_failures(self) -> None:
        for rank, process in self._processes.items():
            returncode = process.poll()
            if returncode and self._code is None:
                self._failed = rank
                others = "; ending the others" if len(self._processes) > 1 else ""
                say(f"rank {rank} (process {process.pid}) {how_it_ended(returncode)}{others}")
                self._end(signal.SIGTERM, as_exit_code(returncode))

    def _heed_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if self._code is None:
                say(f"{number.name}: passed on to all ranks; again to kill them at once")
                self._end(_PASSED_ON[number], 128 + number)
            else:
                self._kill_at = 0.0

    def _end(self, number: signal.Signals, code: int) -> None:
        """Ask all ranks to end, and note how long they may take and what we return then."""
        self._code = code
        self._kill_at = time.monotonic() + self._grace
        self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            process.send_signal(number)  # does nothing to one that has ended

    def _reap(self) -> None:
        """Kill what is left of the ranks and of what they started."""
        assert self._reaper.stdin
        with contextlib.suppress(BrokenPipeError):
            self._reaper.stdin.close()
        self._reaper.wait()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_SECONDS)

    def _report(self) -> None:
        """Say how it ended, where not all ranks ended well or as the user wanted it."""
        failed = self._failed
        if failed is not None:
            path = self._output.log_path(failed)
            where = f" (all of them: {path})" if path else ""
            lines = self._output.last_lines(failed)
            say(f"last lines of rank {failed}{where}:\n{lines or 'there are none'}")
        for rank, process in self._processes.items():
            if rank != failed and (failed is not None or process.returncode is None):
                say(f"rank {rank} {how_it_ended(process.returncode)}")
