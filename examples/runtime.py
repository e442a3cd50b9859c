"""What stands between the settings and JAX: virtual devices, processes, the mesh, signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from presets import SettingsError

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding

_HOST_DEVICES_FLAG = "--xla_force_host_platform_device_count"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as the environment describes them."""

    coordinator: str | None
    """host:port of process 0; None for a run of one process."""
    count: int
    index: int


def processes() -> Processes:
    """Reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    `python -m jaxmoe launch` sets them. Raises SettingsError when some of them are set and others
    are not.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name)]
    if len(missing) == len(names):
        return Processes(None, 1, 0)
    if missing:
        raise SettingsError(
            f"several processes: {', '.join(missing)} is not set. Set all of {', '.join(names)} in "
            "each process, or none of them to run a single one."
        )
    address, count, index = (os.environ[name] for name in names)
    return Processes(address, int(count), int(index))


def set_host_devices(count: int | None) -> None:
    """Asks XLA for virtual CPU devices, `count` in all processes; call it before JAX starts.

    A count that stands in XLA_FLAGS already is left alone. On a machine with accelerators the flag
    does no harm: JAX does not use its CPU devices there.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if count is not None and _HOST_DEVICES_FLAG not in flags:
        here = -(-count // processes().count)
        os.environ["XLA_FLAGS"] = f"{flags} {_HOST_DEVICES_FLAG}={here}".strip()


def join_processes() -> None:
    """Connects the processes of a run, where there are several and nobody has done so yet."""
    import jax

    run = processes()
    if run.coordinator is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(run.coordinator, run.count, run.index)


def wait_for_processes(name: str) -> None:
    """Returns when all processes of the run are here; `name` says what for."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def make_mesh(devices: int | None, data_parallel: int) -> Mesh:
    """A mesh of axes (data, expert) over the first `devices` devices, or over all.

    Raises SettingsError when there are fewer, or the data axis does not divide them.
    """
    import jax

    available = jax.devices()
    count = len(available) if devices is None else devices
    if count > len(available):
        raise SettingsError(
            f"devices: {count} wanted, but this machine shows JAX {len(available)} "
            f"({available[0].platform}). Pass --devices {len(available)}, or set JAX_PLATFORMS=cpu "
            "for virtual devices."
        )
    if count % data_parallel:
        raise SettingsError(
            f"data_parallel ({data_parallel}) must divide the {count} devices of the run. Change "
            "--data-parallel or --devices."
        )
    return jax.make_mesh(
        (data_parallel, count // data_parallel),
        ("data", "expert"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=available[:count],
    )


def put(array: np.ndarray, sharding: NamedSharding) -> Any:
    """The array on the devices of a sharding; every process holds all of it and gives its part."""
    import jax

    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(array: Any) -> np.ndarray:
    """All of an array that lies on the devices of all processes, which must ask together."""
    import jax

    if jax.process_count() == 1:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def only_first_prints() -> AbstractContextManager[object]:
    """Within it, standard output is that of the first process alone."""
    if processes().index == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can save and stop; a second one acts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> StopSignal:
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, self._before[self.received])

    def agreed(self) -> bool:
        """Whether any process of the run was told to stop; all processes must ask together."""
        import jax

        told = self.received is not None
        if jax.process_count() == 1:
            return told
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(told)).any())
