"""What stands between the settings and JAX: virtual devices, processes, the mesh, signals."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np

from presets import SettingsError

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding

_HOST_DEVICES_FLAG = "--xla_force_host_platform_device_count"


def set_host_devices(count: int | None) -> None:
    """Asks XLA for that many virtual CPU devices; call it before JAX starts its backends.

    A count that stands in XLA_FLAGS already is left alone. On a machine with accelerators the flag
    does no harm: JAX does not use its CPU devices there.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if count is not None and _HOST_DEVICES_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_HOST_DEVICES_FLAG}={count}".strip()


def start_distributed() -> None:
    """Joins the processes of a run, where the environment says that there are several.

    Set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.
    """
    import jax

    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return
    if len(found) < len(names):
        missing = ", ".join(name for name in names if name not in found)
        raise SettingsError(
            f"several processes: {', '.join(found)} is set, but {missing} is not. Set all three of "
            "them in each process, or none to run a single one."
        )
    jax.distributed.initialize(
        coordinator_address=found[names[0]],
        num_processes=int(found[names[1]]),
        process_id=int(found[names[2]]),
    )


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
