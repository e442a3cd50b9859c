"""Where the time of a program goes on a GPU: its kernels, from a trace; and the memory's speed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a trace."""

    name: str
    num_launches: int
    seconds: float


@dataclass(frozen=True)
class KernelTimes:
    """What one GPU did in a trace, the largest kernels first."""

    kernels: list[Kernel]
    busy: float
    """Seconds in which at least one kernel or copy ran."""
    span: float
    """Seconds from the first one's start to the last one's end."""

    def describe(self, num_steps: int, most: int = 40) -> list[str]:
        """A table per step; `most` kernels at most."""
        launches = sum(kernel.num_launches for kernel in self.kernels)
        lines = [
            f"kernels: {launches / num_steps:.0f} a step, {self.busy / num_steps * 1e6:.0f} us of "
            f"{self.span / num_steps * 1e6:.0f} us busy",
            f"{'us a step':>10} {'launches':>9} {'us each':>8}  kernel",
        ]
        for kernel in self.kernels[:most]:
            lines.append(
                f"{kernel.seconds / num_steps * 1e6:10.1f} {kernel.num_launches / num_steps:9.1f} "
                f"{kernel.seconds / kernel.num_launches * 1e6:8.2f}  {kernel.name[:100]}"
            )
        return lines


def trace(directory: Path, run: Callable[[], None]) -> KernelTimes | None:
    """Runs something traced into a directory, for TensorBoard too; None where no GPU was seen.

    run: returns when its work is done on the device.
    """
    with jax.profiler.trace(str(directory)):
        run()
    newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return read(newest)


def read(path: Path) -> KernelTimes | None:
    """The kernels of the first GPU in a trace (.xplane.pb); None if there are none."""
    events = sorted(_events(path))
    if not events:
        return None
    totals: dict[str, list[float]] = defaultdict(list)
    busy, end = 0.0, events[0][0]
    for start, stop, name in events:
        totals[name].append(stop - start)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    kernels = [Kernel(name, len(times), sum(times)) for name, times in totals.items()]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return KernelTimes(kernels, busy, end - events[0][0])


def copy_bandwidth(num_bytes: int = 1 << 30, repeats: int = 10) -> float:
    """Bytes a second that a copy reads and writes in the memory of the first device."""
    copy = jax.jit(lambda a: a + jnp.uint32(1), donate_argnums=0)
    a = copy(jax.device_put(jnp.zeros(num_bytes // 4, jnp.uint32), jax.local_devices()[0]))
    a.block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        a = copy(a)
    a.block_until_ready()
    return 2 * num_bytes * repeats / (time.perf_counter() - start)


def _events(path: Path) -> Iterator[tuple[float, float, str]]:
    """Start and stop in seconds and the name of what ran on the streams of the first GPU."""
    planes = jax.profiler.ProfileData.from_file(str(path)).planes  # type: ignore[attr-defined]
    gpus = sorted(
        (plane for plane in planes if plane.name.startswith("/device:GPU:")),
        key=lambda plane: plane.name,
    )
    for plane in gpus[:1]:
        for line in plane.lines:
            # The others repeat the same times by HLO operation and by module.
            if line.name.startswith("Stream"):
                for event in line.events:
                    start = event.start_ns * 1e-9
                    yield start, start + event.duration_ns * 1e-9, event.name
