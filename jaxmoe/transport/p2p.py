"""`transport="p2p"`: one process with several GPUs that store into each other's memory."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxmoe.transport import common, cuda

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec


def why_not(mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> str:
    """Why this transport cannot serve the group; empty if it can."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    if any(d.platform != "gpu" for d in devices):
        return f"it serves GPUs and the mesh has {devices[0].platform} devices"
    if any(d.process_index != jax.process_index() for d in devices):
        return "it serves the GPUs of one process and the mesh spans several"
    return cuda.why_not_sizes(spec) or cuda.load("cuda")[1]


class P2pGroup(cuda.CudaGroup):
    """One group's heaps."""

    def __init__(self, mesh: jax.sharding.Mesh | None, spec: GroupSpec):
        lib, reason = cuda.load("cuda")
        if reason:
            raise RuntimeError(f"ExpertParallel: transport 'p2p' cannot run here: {reason}")
        sizes, uid = cuda.sizes_of(spec), common.new_uid(mesh, spec)
        devices = common.per_device(mesh, spec, lambda d: d.local_hardware_id).astype(np.int32)
        try:
            cuda.call(
                lib.jaxmoe_cuda_open_p2p,
                ctypes.c_int64(uid),
                ctypes.byref(sizes),
                ctypes.c_int(devices.shape[0]),
                devices.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_double(spec.timeout),
                ctypes.c_int(spec.num_sms or 0),
            )
        except RuntimeError as error:
            raise RuntimeError(f"ExpertParallel: transport 'p2p': {error}") from error
        super().__init__(lib, uid, sizes)
