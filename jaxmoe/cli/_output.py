"""What the ranks of a launch print: onto the terminal line by line, and into files as it came."""

from __future__ import annotations

import collections
import os
import re
import selectors
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO, BinaryIO

_NUM_LAST_LINES = 20
_MAX_LINE_BYTES = 1 << 16
# A progress bar ends its lines with a carriage return alone.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\n|\Z)")


class Output:
    """Reads the ranks' pipes.

    Args:
      log_dir: folder for one file per rank, with all that the rank prints; None for no files.
      shown: the ranks whose lines go to the terminal, each after the rank's number; None for all.
    """

    def __init__(self, log_dir: Path | None, shown: Collection[int] | None) -> None:
        self._log_dir = log_dir
        self._shown = shown
        self._files: dict[int, BinaryIO] = {}
        self._selector = selectors.DefaultSelector()
        self._last: dict[int, collections.deque[bytes]] = {}
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)

    def log_path(self, rank: int) -> Path | None:
        """The rank's file."""
        return None if self._log_dir is None else self._log_dir / f"rank{rank}.log"

    def add(self, rank: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        """Read these two pipes of a rank from now on."""
        self._last[rank] = collections.deque(maxlen=_NUM_LAST_LINES)
        path = self.log_path(rank)
        if path is not None:
            self._files[rank] = path.open("wb")
        for pipe, terminal in ((stdout, sys.stdout), (stderr, sys.stderr)):
            self._selector.register(pipe, selectors.EVENT_READ, _Stream(rank, terminal.buffer))

    def pump(self, seconds: float) -> bool:
        """Pass on what has come, waiting at most so long for something; whether any pipe is left.

        Raises BrokenPipeError when nobody reads the terminal's side any more.
        """
        if not self._selector.get_map():
            time.sleep(seconds)
            return False
        for key, _ in self._selector.select(seconds):
            data = os.read(key.fd, 1 << 16)
            stream: _Stream = key.data
            if not data:
                self._selector.unregister(key.fileobj)
            elif stream.rank in self._files:
                self._files[stream.rank].write(data)
                self._files[stream.rank].flush()
            for line in stream.lines(data):
                self._last[stream.rank].append(line)
                if self._shown is None or stream.rank in self._shown:
                    stream.terminal.write(b"[%d] %s\n" % (stream.rank, line))
            stream.terminal.flush()
        return True

    def drain(self, seconds: float) -> None:
        """Pass on the rest, until all pipes are closed or time is up."""
        until = time.monotonic() + seconds
        while self._selector.get_map() and time.monotonic() < until:
            self.pump(0.05)
        for file in self._files.values():
            file.close()

    def last_lines(self, rank: int) -> str:
        """The newest lines of a rank, of both its pipes."""
        lines = self._last[rank]
        return "\n".join(f"[{rank}] {line.decode(errors='replace')}" for line in lines)


class _Stream:
    """One pipe: cuts what comes into lines."""

    def __init__(self, rank: int, terminal: BinaryIO) -> None:
        self.rank = rank
        self.terminal = terminal
        self._rest = b""

    def lines(self, data: bytes) -> list[bytes]:
        """Lines that are complete with `data`; no data is the end of the last one."""
        *lines, self._rest = _cut(self._rest + data)
        if self._rest and (not data or len(self._rest) > _MAX_LINE_BYTES):
            lines.append(self._rest.removesuffix(b"\r"))
            self._rest = b""
        return lines


def _cut(data: bytes) -> list[bytes]:
    """Lines of `data`, the last one incomplete. What a carriage return leaves empty is no line."""
    pieces, start = [], 0
    for end in _LINE_END.finditer(data):
        if end.start() > start or end.group() != b"\r":
            pieces.append(data[start : end.start()])
        start = end.end()
    return [*pieces, data[start:]]
