"""The device's clock: CUDA events on XLA's stream, before and after each of many calls.

A custom call of the CUDA library (`xla_ffi/cuda/timing.cc`) records them. All operands of an
operation pass through the record before it, unchanged and in place, and all its results go into
the record behind it, so that the data dependencies alone keep the order, and no two calls are
equal. What lies between two records is the operation with every kernel it has.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmoe.bench.clocks import (
    WARM_UPS,
    Operation,
    Timing,
    compile_on,
    copies_of,
    slowest,
    summarize,
    warm_up,
)
from jaxmoe.transport import cuda, nvshmem

_TARGET = "jaxmoe_cuda_record"


@functools.cache
def load(transport: str) -> tuple[Any, str]:
    """The library that records for a transport, or None and the reason."""
    if jax.default_backend() != "gpu":
        return None, f"CUDA events need GPUs, and these are {jax.default_backend()} devices"
    lib, reason = nvshmem.load() if transport == "nvshmem" else cuda.load("cuda")
    if lib is None:
        return None, f"CUDA events need the library with the kernels: {reason}"
    if not hasattr(lib, _TARGET):
        return None, "the CUDA library was built before it could record events; build it again"
    capsule = jax.ffi.pycapsule(getattr(lib, _TARGET))
    jax.ffi.register_ffi_target(target(transport), capsule, platform="CUDA")
    return lib, ""


def target(transport: str) -> str:
    return f"{_TARGET}_{'nvshmem' if transport == 'nvshmem' else 'cuda'}"


def time_with_events(operation: Operation, transport: str, calls: int, repeats: int) -> Timing:
    """Time `calls` calls in a row, `repeats` times. On the slowest device: the median of each."""
    lib, reason = load(transport)
    if lib is None:
        raise RuntimeError(reason)
    devices = _local_devices(operation.mesh)
    for device in devices:
        cuda.call(lib.jaxmoe_cuda_make_events, ctypes.c_int(device), ctypes.c_int64(calls + 1))
    program = compile_calls(operation, target(transport), calls)
    warm_up(program, operation)
    us = []
    for _ in range(repeats):
        jax.block_until_ready(program(*operation.operands))
        us.append(max(_median_us(lib, device, calls) for device in devices))
    copies = copies_between(program.as_text(), target(transport), operation.operands)
    note = f"events: with {copies} copies of an operand in {calls} calls" if copies else ""
    return summarize(slowest(us), calls, note)


def intervals(
    mesh: jax.sharding.Mesh, transport: str, num: int, run: Callable[[], Any], repeats: int
) -> list[list[list[float]]]:
    """Microseconds between the `num + 1` records of a program that `run` calls: for each interval
    and repeat those of every device of this process.
    """
    lib, reason = load(transport)
    if lib is None:
        raise RuntimeError(reason)
    devices = _local_devices(mesh)
    for device in devices:
        cuda.call(lib.jaxmoe_cuda_make_events, ctypes.c_int(device), ctypes.c_int64(num + 1))
    for _ in range(WARM_UPS["gpu"]):
        jax.block_until_ready(run())
    us: list[list[list[float]]] = [[] for _ in range(num)]
    for _ in range(repeats):
        jax.block_until_ready(run())
        for slot in range(num):
            us[slot].append([_elapsed_us(lib, device, slot) for device in devices])
    return us


def compile_calls(operation: Operation, target: str, calls: int) -> Any:
    """A program of `calls` calls with a record before each and one at the end."""
    program = chain(operation.function, target, calls)
    return compile_on(operation.mesh, program, operation.operands, operation.compiler_options)


def chain(function: Callable[..., Any], target: str, calls: int) -> Callable[..., Any]:
    """One device's part of that program."""

    def program(*operands: Any) -> Any:
        results = None
        for slot in range(calls):
            operands = record(target, slot, operands, results)
            results = function(*operands)
        operands = record(target, calls, operands, results)
        return min(jax.tree.leaves(operands), key=lambda a: a.size)  # the last record is needed

    return program


def copies_between(hlo: str, target: str, operands: Any) -> int:
    """Copies of an operand that a compiled program makes between its first record and its last."""
    lines = hlo.splitlines()
    places = [i for i, line in enumerate(lines) if f'custom_call_target="{target}"' in line]
    return len(copies_of(operands, lines[places[0] : places[-1]]))


def record(target: str, slot: int, through: Any, after: Any) -> Any:
    """Arrays `through`, unchanged, once an event is recorded behind all that made `after`."""
    leaves, treedef = jax.tree.flatten(through)
    # An operand that is written in place must not be another one, too: XLA would copy it.
    passed = {id(a) for a in leaves}
    rest = [a for a in jax.tree.leaves(after) if id(a) not in passed]
    call = jax.ffi.ffi_call(
        target,
        [jax.typeof(a) for a in leaves],
        input_output_aliases={i: i for i in range(len(leaves))},
    )
    return jax.tree.unflatten(treedef, call(*leaves, *rest, slot=np.int64(slot)))


def _median_us(lib: Any, device: int, calls: int) -> float:
    return statistics.median(_elapsed_us(lib, device, slot) for slot in range(calls))


def _elapsed_us(lib: Any, device: int, slot: int) -> float:
    ms = ctypes.c_float()
    places = ctypes.c_int64(slot), ctypes.c_int64(slot + 1)
    cuda.call(lib.jaxmoe_cuda_elapsed_ms, ctypes.c_int(device), *places, ctypes.byref(ms))
    return 1e3 * ms.value


def _local_devices(mesh: jax.sharding.Mesh) -> list[int]:
    devices = mesh.devices.flat
    return [d.local_hardware_id for d in devices if d.process_index == jax.process_index()]
