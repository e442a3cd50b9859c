"""What the GPU transports share: the kernels' libraries, their limits, and failures on the device.

The same kernels are built into two libraries, without and with NVSHMEM; each is loaded when a
group asks for it, and registers its custom calls under names of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxmoe import latency
from jaxmoe.transport import failures

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec

_MESSAGE_BYTES = 1024
_VARIABLES = {
    "cuda": "JAXMOE_CUDA_LIBRARY",
    "nvshmem": "JAXMOE_NVSHMEM_LIBRARY",
    "gemm": "JAXMOE_GEMM_LIBRARY",
}


class GroupSizes(ctypes.Structure):
    """`GroupSizes` of xla_ffi/cuda/layout.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "num_devices",
            "num_local_experts",
            "max_tokens",
            "top_k",
            "row_bytes",
            "puts",
            "latency_tokens",
            "max_pending",
        )
    ]


def sizes_of(spec: GroupSpec, puts: bool = False) -> GroupSizes:
    latency_tokens = 0
    if not puts:
        latency_tokens = latency.tokens_of(
            spec.mode, spec.max_tokens, spec.num_devices, spec.top_k, _row_bytes(spec)
        )
    return GroupSizes(
        spec.num_devices,
        spec.num_experts // spec.num_devices,
        max(spec.max_tokens, 1),
        spec.top_k,
        _row_bytes(spec),
        puts,
        latency_tokens,
        spec.max_pending if latency_tokens else 0,
    )


@functools.cache
def load(name: str) -> tuple[Any, str]:
    """The library "cuda" or "nvshmem" with its handlers registered, or None and the reason."""
    path = library_path(name)
    if path is None:
        return None, f"jaxmoe was installed without it: {build_status()}"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"its library {path.name} cannot be loaded ({error})"
    lib.jaxmoe_cuda_heap_bytes.restype = ctypes.c_int64
    from jaxmoe import _ffi

    handlers = {
        target: jax.ffi.pycapsule(getattr(lib, target))
        for target in (*_ffi.TARGETS, *_ffi.RECORDED_TARGETS, *_ffi.SPLIT_TARGETS)
    }
    _ffi.register(handlers, {}, platform="CUDA", suffix=_ffi.suffix_of(name))
    return lib, ""


def library_path(name: str) -> Path | None:
    """Where the library lies; None if it was not built."""
    named = os.environ.get(_VARIABLES[name])
    if named:
        return Path(named)
    found = (place / f"libjaxmoe_{name}.so" for place in _places())
    return next((path for path in found if path.exists()), None)


def _places() -> list[Path]:
    # An editable install has its libraries elsewhere than its sources.
    packages = [Path(p) / "jaxmoe" for p in sys.path] + [Path(__file__).parent.parent]
    return [package / "lib" for package in packages]


def build_status() -> str:
    texts = (place / "cuda_library.txt" for place in _places())
    return next((text.read_text().strip() for text in texts if text.exists()), "reinstall it")


def why_not_sizes(spec: GroupSpec) -> str:
    """Why the kernels cannot serve the sizes; empty if they can."""
    limits = (
        (
            _row_bytes(spec) % 16 == 0,
            f"rows of whole 16 bytes; dim {spec.dim} of {spec.dtype} is not",
        ),
        (
            spec.wire_dtype is None or spec.dim % 16 == 0,
            f"a dim that is a multiple of 16 for an FP8 wire, got {spec.dim}",
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


def call(function: Any, *args: Any) -> None:
    """Call a function of a library that fills a message on failure; raises that."""
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if function(*args, message, ctypes.c_int(_MESSAGE_BYTES)):
        raise RuntimeError(message.value.decode(errors="replace"))


class CudaGroup:
    """A group that a library has opened under `uid`; `heap_bytes` on each device. Calls of up to
    `latency_tokens` tokens take the low-latency kernels, of up to `split_tokens` in two halves.
    """

    def __init__(self, lib: Any, uid: int, sizes: GroupSizes):
        self._lib = lib
        self.uid = uid
        self.latency_tokens = int(sizes.latency_tokens)
        self.split_tokens = self.latency_tokens if sizes.max_pending else 0
        self.heap_bytes = int(lib.jaxmoe_cuda_heap_bytes(ctypes.byref(sizes)))
        failures.watch(lib)

    def close(self) -> None:
        self._lib.jaxmoe_cuda_close(ctypes.c_int64(self.uid))
