"""`transport="p2p"`: one process with several GPUs that store into each other's memory."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxmoe.transport import common

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec

_MESSAGE_BYTES = 1024


class _GroupSizes(ctypes.Structure):
    """`GroupSizes` of xla_ffi/cuda/layout.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("num_devices", "num_local_experts", "max_tokens", "top_k", "row_bytes")
    ]


@functools.cache
def _load() -> tuple[Any, str]:
    """The CUDA library with its handlers registered, or None and the reason."""
    path = _library()
    if path is None:
        return None, "jaxmoe was installed without its CUDA library (nvcc was not there); reinstall"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"its library {path.name} cannot be loaded ({error})"
    lib.jaxmoe_cuda_heap_bytes.restype = ctypes.c_int64
    from jaxmoe import _ffi

    handlers = {name: jax.ffi.pycapsule(getattr(lib, name)) for name in _ffi.TARGETS}
    _ffi.register(handlers, {}, platform="CUDA")
    return lib, ""


def _library() -> Path | None:
    named = os.environ.get("JAXMOE_CUDA_LIBRARY")
    if named:
        return Path(named)
    places = [Path(p) / "jaxmoe" for p in sys.path] + [Path(__file__).parent.parent]
    found = (place / "lib" / "libjaxmoe_cuda.so" for place in places)
    return next((path for path in found if path.exists()), None)


def why_not(mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> str:
    """Why this transport cannot serve the group; empty if it can."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    if any(d.platform != "gpu" for d in devices):
        return f"it serves GPUs and the mesh has {devices[0].platform} devices"
    if any(d.process_index != jax.process_index() for d in devices):
        return "it serves the GPUs of one process and the mesh spans several"
    return _why_not_sizes(spec) or _load()[1]


def _why_not_sizes(spec: GroupSpec) -> str:
    limits = (
        (
            _row_bytes(spec) % 16 == 0,
            f"rows of whole 16 bytes; dim {spec.dim} of {spec.dtype} is not",
        ),
        (spec.top_k <= 32, f"top_k of at most 32, got {spec.top_k}"),
        (spec.num_devices <= 72, f"at most 72 devices on the expert axis, got {spec.num_devices}"),
        (
            spec.num_experts // spec.num_devices <= 2048,
            f"at most 2048 experts per device, got {spec.num_experts // spec.num_devices}",
        ),
        (
            spec.num_devices == 1 or spec.num_sms is None or spec.num_sms >= 2,
            f"num_sms of at least 2, got {spec.num_sms}",
        ),
    )
    return next((f"its kernels need {what}" for fits, what in limits if not fits), "")


def _row_bytes(spec: GroupSpec) -> int:
    return spec.dim * jax.numpy.dtype(spec.dtype).itemsize


class P2pGroup:
    """One group's heaps."""

    def __init__(self, mesh: jax.sharding.Mesh | None, spec: GroupSpec):
        self._lib, reason = _load()
        if reason:
            raise RuntimeError(f"ExpertParallel: transport 'p2p' cannot run here: {reason}")
        sizes = _sizes(spec)
        self.uid = common.new_uid(mesh, spec)
        self.heap_bytes = self._lib.jaxmoe_cuda_heap_bytes(ctypes.byref(sizes))
        devices = common.per_device(mesh, spec, lambda d: d.local_hardware_id).astype(np.int32)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        failed = self._lib.jaxmoe_cuda_open_p2p(
            ctypes.c_int64(self.uid),
            ctypes.byref(sizes),
            ctypes.c_int(devices.shape[0]),
            devices.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_double(spec.timeout),
            ctypes.c_int(spec.num_sms or 0),
            message,
            ctypes.c_int(_MESSAGE_BYTES),
        )
        if failed:
            raise RuntimeError(f"ExpertParallel: transport 'p2p': {message.value.decode()}")

    def close(self) -> None:
        self._lib.jaxmoe_cuda_close(ctypes.c_int64(self.uid))


def _sizes(spec: GroupSpec) -> _GroupSizes:
    return _GroupSizes(
        spec.num_devices,
        spec.num_experts // spec.num_devices,
        max(spec.max_tokens, 1),
        spec.top_k,
        _row_bytes(spec),
    )
