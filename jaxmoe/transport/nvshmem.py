"""`transport="nvshmem"`: one process per GPU, joined by `jax.distributed`.

The processes meet in the key-value store of `jax.distributed`, form one NVSHMEM world, and keep
the heaps of all groups in its symmetric memory. Peers of the same NVLink domain are reached by
plain stores, others by NVSHMEM's puts. With `JAXMOE_NVSHMEM_PUTS=1` in the environment of every
process all peers are taken for others, to test that path on one machine.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.transport import common, cuda

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec

_HOST_LIBRARY = "libnvshmem_host.so.3"
_OLDEST = (3, 4, 5)
_closed: set[int] = set()  # groups of this process whose heaps are not freed yet
_joined: list[bool] = []  # what joining the world gave


def why_not(mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> str:
    """Why this transport cannot serve the group; empty if it can."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    if any(d.platform != "gpu" for d in devices):
        return f"it serves GPUs and the mesh has {devices[0].platform} devices"
    return _why_not_world(devices) or cuda.why_not_sizes(spec) or load()[1]


def _why_not_world(devices: list[jax.Device]) -> str:
    if common.kv_client() is None:
        return (
            "it serves one process per GPU, joined by jax.distributed, and this process is alone; "
            "start the program with `python -m jaxmoe launch`"
        )
    if jax.local_device_count() != 1:
        return (
            f"it takes one GPU per process and this process has {jax.local_device_count()}; start "
            "one process per GPU with `python -m jaxmoe launch`, or use transport='p2p' in one "
            "process"
        )
    if len(devices) != jax.process_count():
        return (
            f"its groups span all processes, and the mesh has {len(devices)} devices of the "
            f"{jax.process_count()} processes; put the others on a further axis of the mesh"
        )
    return ""


@functools.cache
def load() -> tuple[Any, str]:
    """The library with NVSHMEM, or None and the reason."""
    path, reason = host_library()
    if path is None:
        return None, reason
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return None, f"NVSHMEM's library {path} cannot be loaded ({error})"
    return cuda.load("nvshmem")


def host_library() -> tuple[Path | None, str]:
    """NVSHMEM's shared library in its wheel, or None and the reason."""
    for wheel in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        try:
            version = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            continue
        oldest = ".".join(map(str, _OLDEST))
        numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
        if numbers < _OLDEST or numbers[0] != _OLDEST[0]:
            return None, f"it needs {wheel} >= {oldest} and < {_OLDEST[0] + 1}, found {version}"
        spec = importlib.util.find_spec("nvidia.nvshmem")
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        found = (Path(folder) / "lib" / _HOST_LIBRARY for folder in folders)
        path = next((path for path in found if path.exists()), None)
        return path, "" if path else f"{wheel} {version} has no {_HOST_LIBRARY}; reinstall it"
    return None, "NVSHMEM is not installed; install jaxmoe[cuda13] (or jaxmoe[cuda12])"


class NvshmemGroup(cuda.CudaGroup):
    """One group's heap in the symmetric memory. Made by all processes in the same order."""

    def __init__(self, mesh: jax.sharding.Mesh, spec: GroupSpec):
        lib, reason = load()
        if reason:
            raise RuntimeError(f"ExpertParallel: transport 'nvshmem' cannot run here: {reason}")
        uid = common.new_uid(mesh, spec)
        try:
            puts = _join(lib, spec.timeout)
            sizes = cuda.sizes_of(spec, puts)
            _open(lib, mesh, spec, uid, sizes)
        except Exception as error:
            raise RuntimeError(
                f"ExpertParallel: transport 'nvshmem': process {jax.process_index()} could not "
                f"open the group within {spec.timeout} s: {error}. All processes must make the "
                "same groups in the same order."
            ) from error
        super().__init__(lib, uid, sizes)

    def close(self) -> None:
        super().close()
        _closed.add(self.uid)


def _join(lib: Any, timeout: float) -> bool:
    """Make this process part of the NVSHMEM world, once; whether groups need room for puts."""
    if not _joined:
        _joined.append(_join_world(lib, timeout))
    return _joined[0]


def _join_world(lib: Any, timeout: float) -> bool:
    client, rank, num = common.kv_client(), jax.process_index(), jax.process_count()
    timeout_ms, prefix = int(timeout * 1000), "jaxmoe/nvshmem/world"
    # NVSHMEM's start has no time limit of its own: begin when everybody is there.
    client.wait_at_barrier(f"{prefix}/here", timeout_ms)
    jax.block_until_ready(jnp.zeros(8) + 1)  # XLA's context comes first
    if rank == 0:
        unique = ctypes.create_string_buffer(lib.jaxmoe_nvshmem_id_bytes())
        if lib.jaxmoe_nvshmem_new_id(unique):
            raise RuntimeError("NVSHMEM gave no id; NVSHMEM_DEBUG=INFO says more")
        client.key_value_set_bytes(f"{prefix}/id", unique.raw)
    unique_id = client.blocking_key_value_get_bytes(f"{prefix}/id", timeout_ms)
    device = jax.local_devices()[0].local_hardware_id
    cuda.call(lib.jaxmoe_nvshmem_join, unique_id, rank, num, device)
    puts = bool(os.environ.get("JAXMOE_NVSHMEM_PUTS")) or not lib.jaxmoe_nvshmem_reaches_all()
    return any(json.loads(text) for text in _exchange(prefix, json.dumps(puts), timeout_ms))


def _open(lib: Any, mesh: Any, spec: GroupSpec, uid: int, sizes: cuda.GroupSizes) -> None:
    """Allocate the heap together with all processes, after freeing what all have closed."""
    timeout_ms, prefix = int(spec.timeout * 1000), f"jaxmoe/nvshmem/{uid:x}"
    closed = [set(json.loads(t)) for t in _exchange(prefix, json.dumps([*_closed]), timeout_ms)]
    for old in sorted(set.intersection(*closed)):
        lib.jaxmoe_nvshmem_free(ctypes.c_int64(old))
        _closed.discard(old)
    here = jax.process_index()
    processes = common.per_device(mesh, spec, lambda d: d.process_index).astype(np.int32)
    slice_id, rank = np.argwhere(processes == here)[0]
    pes = np.ascontiguousarray(processes[slice_id])
    cuda.call(
        lib.jaxmoe_nvshmem_open,
        ctypes.c_int64(uid),
        ctypes.byref(sizes),
        pes.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int(int(rank)),
        ctypes.c_int(jax.local_devices()[0].local_hardware_id),
        ctypes.c_int(bool(os.environ.get("JAXMOE_NVSHMEM_PUTS"))),
        ctypes.c_double(spec.timeout),
        ctypes.c_int(spec.num_sms or 0),
    )
    try:
        common.kv_client().wait_at_barrier(f"{prefix}/open", timeout_ms)
    except BaseException:
        lib.jaxmoe_cuda_close(ctypes.c_int64(uid))
        raise


def _exchange(prefix: str, text: str, timeout_ms: int) -> list[str]:
    """What every process says under a key, in the order of the processes."""
    client = common.kv_client()
    client.key_value_set(f"{prefix}/{jax.process_index()}", text)
    return [
        client.blocking_key_value_get(f"{prefix}/{peer}", timeout_ms)
        for peer in range(jax.process_count())
    ]
