"""Grouped products by the kernels of xla_ffi/gemm: Hopper GPUs, bfloat16."""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp

from jaxmoe import _ffi
from jaxmoe.transport import cuda as libraries

forward = _ffi.grouped_matmul
input_grad = _ffi.grouped_input_grad
input_grad_of_two = _ffi.grouped_input_grad_of_two
weight_grad = _ffi.grouped_weight_grad
swiglu = _ffi.grouped_swiglu

_MULTIPLE = 8  # elements: the copy engine addresses rows by 16 bytes


def why_not(dtype: jnp.dtype, widths: tuple[int, ...], device: jax.Device) -> str:
    """Why the kernels cannot serve a product; empty if they can."""
    if device.platform != "gpu":
        return f"its kernels need a Hopper GPU; the device is a {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return f"its kernels need compute capability 9.0 (Hopper); the device's is {capability}"
    if dtype != jnp.bfloat16:
        return f"its kernels need bfloat16, got {dtype}"
    odd = [width for width in widths if width % _MULTIPLE]
    if odd:
        return f"its kernels need widths that are multiples of {_MULTIPLE}, got {odd[0]}"
    return _why_not_loaded()


@functools.cache
def _why_not_loaded() -> str:
    """Loads the library and registers its handlers; the reason if that fails."""
    path = libraries.library_path("gemm")
    if path is None:
        return f"jaxmoe was installed without it: {libraries.build_status()}"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"its library {path.name} cannot be loaded ({error})"
    for device in jax.local_devices():
        code = lib.jaxmoe_grouped_preload(device.local_hardware_id)
        if code:
            return f"its kernels cannot be loaded on {device} (CUDA error {code})"
    _ffi.register_products(lib)
    return ""
