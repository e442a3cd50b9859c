"""What the measurements ran on: names, versions, and the bandwidths that floors are made from."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmoe.bench import clocks
from jaxmoe.bench.floors import Machine

# GB/s of stores to a peer in one direction, and of reading and writing a device's own memory; both
# measured, by kernels that do nothing else.
_KNOWN = {"H200": (371.0, 3900.0)}
_PACKAGES = ("jaxmoe", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")
_STEPS = 10


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_names() -> list[str]:
    """The kind of every device, on all processes."""
    return [d.device_kind for d in jax.devices()]


def describe(num_devices: int) -> str:
    """The devices of a run, its processes and the version of JAX."""
    kinds = ", ".join(sorted(set(device_names())))
    return f"{num_devices} x {kinds}, {jax.process_count()} process(es), jax {jax.__version__}"


def host() -> str:
    """The host's processor and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def bandwidths(mesh: jax.sharding.Mesh, link_gbs: float | None, hbm_gbs: float | None) -> Machine:
    """Bandwidths as given, else as known for the device, else as XLA's own copies reach them."""
    kind = mesh.devices.flat[0].device_kind
    known = next((gbs for name, gbs in _KNOWN.items() if name in kind), (None, None))
    link, link_source = _choose(link_gbs, known[0], kind, lambda: _measure_link(mesh))
    hbm, hbm_source = _choose(hbm_gbs, known[1], kind, lambda: _measure_memory(mesh))
    return Machine(link, hbm, link_source, hbm_source)


def _choose(
    given: float | None, known: float | None, kind: str, measure: Callable[[], float]
) -> tuple[float, str]:
    if given is not None:
        return given, "given"
    return (known, f"known for {kind}") if known else (measure(), "measured with XLA's own copies")


def _measure_link(mesh: jax.sharding.Mesh) -> float:
    """GB/s in one direction, of every device sending to the next at the same time."""
    (axis,) = mesh.axis_names
    size = mesh.size
    if size == 1:
        return math.inf
    if mesh.devices.flat[0].platform == "cpu":  # their link is the memory that they share
        return _measure_memory(mesh) / 2
    ring = [(i, (i + 1) % size) for i in range(size)]
    return _rate(mesh, lambda a: lax.ppermute(a, axis, ring), bytes_per_byte=1)


def _measure_memory(mesh: jax.sharding.Mesh) -> float:
    """GB/s read and written, while all devices do the same."""
    return _rate(mesh, lambda a: a + jnp.float32(1), bytes_per_byte=2)


def _rate(mesh: jax.sharding.Mesh, step: Callable[[Any], Any], bytes_per_byte: int) -> float:
    num_bytes = 1 << (28 if jax.default_backend() == "gpu" else 22)
    shape = (mesh.size, num_bytes // 4)
    a = sharded(mesh, np.zeros(shape, np.float32))

    def steps(a: Any) -> Any:
        return lax.scan(lambda a, _: (step(a), None), a, None, length=_STEPS)[0]

    program = clocks.compile_on(mesh, steps, (a,))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(program(a))
        seconds.append(time.perf_counter() - start)
    slowest = statistics.median(clocks.slowest(seconds[1:]))
    return bytes_per_byte * num_bytes * _STEPS / slowest / 1e9


def sharded(mesh: jax.sharding.Mesh, a: np.ndarray) -> jax.Array:
    """[R, ...], equal in all processes, with one part on each device."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
