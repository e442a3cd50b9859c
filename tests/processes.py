"""Starts the processes of a multi-process test, and is imported by them.

A test launches a script of `tests/workers/` N times. Each process calls `join` first. The test
asserts the exit code of every process, and a failure shows the log of every process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SHARED_MEMORY = Path("/dev/shm")
GRACE_SECONDS = 5.0  # for the others to end by themselves once one has failed
LAUNCH_SECONDS = float(os.environ.get("JAXMOE_TEST_SECONDS", "240"))  # for a launch on GPUs


def join(**options: object) -> int:
    """Join the processes of this launch through `jax.distributed`; returns this one's number."""
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    rank, num = int(os.environ["JAXMOE_TEST_RANK"]), int(os.environ["JAXMOE_TEST_PROCESSES"])
    if os.environ.get("JAXMOE_TEST_GPU"):
        options["local_device_ids"] = [int(os.environ["JAXMOE_TEST_GPU"])]
    if num > 1:
        jax.distributed.initialize(os.environ["JAXMOE_TEST_ADDRESS"], num, rank, **options)
    return rank


def require_gpus() -> int:
    """The GPUs of this machine; skips the test without any, fails it where more are required."""
    import pytest

    # The processes of a launch need the memory: JAX must not take it here.
    listed = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True).stdout
    count, wanted = listed.count("UUID: GPU"), int(os.environ.get("JAXMOE_REQUIRE_GPUS", "0"))
    if count < wanted:
        pytest.fail(f"JAXMOE_REQUIRE_GPUS={wanted}, but nvidia-smi lists {count} GPUs")
    if count == 0:
        pytest.skip("needs a GPU, nvidia-smi lists none")
    return count


class Launch:
    """Running processes; a context manager that leaves none behind.

    Args:
      worker: name of the script in `tests/workers/`, without its ending.
      num_processes: how many times it is started.
      num_devices: host devices of each process.
      args: further arguments of the script.
      gpus: instead of host devices, the GPU of each process; several may share one, and None is
        all of them.
      environment: further variables. PREFIX is a command that the interpreter is run by.
    """

    def __init__(
        self,
        worker: str,
        num_processes: int,
        num_devices: int,
        *args: str,
        gpus: Sequence[int | None] = (),
        environment: Mapping[str, str] | None = None,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = tempfile.TemporaryDirectory(prefix="jaxmoe-test-")
        self._processes: list[subprocess.Popen[bytes]] = []
        paths = [str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
        for rank in range(num_processes):
            variables = os.environ | {
                "JAXMOE_TEST_ADDRESS": address,
                "JAXMOE_TEST_PROCESSES": str(num_processes),
                "JAXMOE_TEST_RANK": str(rank),
                "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            }
            if gpus:
                gpu = gpus[rank]
                variables |= {
                    "JAXMOE_TEST_GPU": "" if gpu is None else str(gpu),
                    "XLA_FLAGS": "",
                    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several may share the memory
                }
            else:
                variables |= {
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
                }
            variables |= environment or {}
            with self._log_path(rank).open("wb") as log:
                command = variables.pop("PREFIX", "").split()
                command += [sys.executable, str(FOLDER / "workers" / f"{worker}.py"), *args]
                self._processes.append(
                    subprocess.Popen(command, env=variables, stdout=log, stderr=log)
                )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(range(len(self._processes)))
        self._folder.cleanup()

    def wait(self, timeout: float, ranks: Iterable[int] | None = None) -> None:
        """Wait until the processes have ended, or one has failed, or time is up.

        Those that still run then are killed with a signal that nobody can catch
        (`jax.distributed` catches SIGTERM), which their exit code tells.
        """
        awaited = [self._processes[r] for r in ranks or range(len(self._processes))]
        until = time.monotonic() + timeout
        while any(p.poll() is None for p in awaited) and time.monotonic() < until:
            if any(p.poll() for p in awaited):
                until = min(until, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.05)
        for process in awaited:
            _kill(process)

    def kill(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            _kill(self._processes[rank])

    def check(self, wanted: dict[int, int] | None = None) -> list[str]:
        """Assert that every process ended with 0, or its code in `wanted`; returns their logs."""
        codes = {rank: process.wait() for rank, process in enumerate(self._processes)}
        expected = dict.fromkeys(codes, 0) | (wanted or {})
        logs = [self._log_path(rank).read_text(errors="replace") for rank in codes]
        text = "\n".join(
            f"---- process {rank} ended with {codes[rank]}, log:\n{log}"
            for rank, log in enumerate(logs)
        )
        assert codes == expected, f"exit codes {codes}, expected {expected}\n{text}"
        left = [
            path.name
            for process in self._processes
            for path in SHARED_MEMORY.glob(f"jaxmoe-{process.pid}-*")
        ]
        assert not left, f"left in {SHARED_MEMORY}: {left}\n{text}"
        return logs

    def _log_path(self, rank: int) -> Path:
        return Path(self._folder.name) / f"process{rank}.log"


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()


def run(
    worker: str,
    num_processes: int,
    num_devices: int,
    *args: str,
    timeout: float = 120,
    **options: Any,
) -> list[str]:
    """Run a worker to its end on all processes and return their logs."""
    with Launch(worker, num_processes, num_devices, *args, **options) as launch:
        launch.wait(timeout)
        return launch.check()
