"""Questions to the machine that must neither hang nor start CUDA in the process that asks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")
SECONDS = 15.0


@dataclass(frozen=True)
class Answer:
    """What a program printed and its exit code; no code when it did not end in time."""

    output: str
    errors: str
    code: int | None

    @property
    def plain(self) -> str:
        """The output without escape sequences, which nvidia-smi underlines a head by."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.output)


def ask(
    command: Sequence[str],
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Answer | None:
    """Run a program for at most `seconds`, or `SECONDS`; None when there is no such program."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError:
        return None
    try:
        output, errors = process.communicate(timeout=SECONDS if seconds is None else seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        # Not for ever: a process that hangs in a driver does not even heed SIGKILL.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        return Answer("", "", None)
    return Answer(output, errors, process.returncode)


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that a CUDA program would see here."""
    answer = ask(["nvidia-smi", "-L"])
    if answer is not None and answer.code == 0:
        found = sum(line.startswith("GPU ") for line in answer.output.splitlines())
    else:
        found = len(list(_DRIVER_FOLDER.iterdir())) if _DRIVER_FOLDER.is_dir() else 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # CUDA takes the entries up to the first that is none, such as -1.
    entries = [entry.strip() for entry in visible.split(",")]
    none = (i for i, entry in enumerate(entries) if not entry or entry.startswith("-"))
    return min(found, next(none, len(entries)))
