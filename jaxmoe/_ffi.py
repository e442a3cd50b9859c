"""The custom calls of the operations; beside it only `jaxmoe.bench.events` touches `jax.ffi`.

One registered name per operation; each platform registers its own implementation under it (and the
library with NVSHMEM under a name of its own, for it may lie beside the one without). The
static configuration of a call crosses as one struct attribute, `CONFIG_FIELDS`, which
`xla_ffi/common/config.h` declares again.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jaxmoe import reference, wire
from jaxmoe.plan import Plan

if TYPE_CHECKING:
    from jaxmoe.group import ExpertParallel

CONFIG_FIELDS = ("group", "site", "num_devices", "num_experts", "top_k", "wire")
TARGETS = (
    "jaxmoe_dispatch",
    "jaxmoe_dispatch_fp8_rows",
    "jaxmoe_combine",
    "jaxmoe_dispatch_grad",
    "jaxmoe_combine_grad",
)
# Those of which GPUs have a second one, for XLA to record in command buffers; see `_call`.
RECORDED = "_recorded"
RECORDED_TARGETS = tuple(target + RECORDED for target in TARGETS[:3])
# Calls in two halves; for GPUs, and always recorded.
SPLIT_TARGETS = (
    "jaxmoe_dispatch_start",
    "jaxmoe_dispatch_done",
    "jaxmoe_dispatch_fp8_rows_done",
    "jaxmoe_combine_start",
    "jaxmoe_combine_done",
)
PRODUCT_TARGETS = (
    "jaxmoe_grouped_matmul",
    "jaxmoe_grouped_input_grad",
    "jaxmoe_grouped_input_grad_of_two",
    "jaxmoe_grouped_weight_grad",
    "jaxmoe_grouped_swiglu",
    "jaxmoe_grouped_swiglu_saving",
    "jaxmoe_grouped_fp8",
)
I32, F32 = jnp.int32, jnp.float32


def suffix_of(library: str) -> str:
    """What follows the names of a library's custom calls: a process may load both CUDA ones."""
    return "_nvshmem" if library == "nvshmem" else ""


def register(
    handlers: dict[str, Any], types: dict[str, Any], platform: str, suffix: str = ""
) -> None:
    """Make a library's handlers known to XLA, and before them the types of the state they keep.

    `handlers` maps targets to their capsules by stage: `TARGETS`, on GPUs also the others.
    """
    for name, registration in types.items():
        jax.ffi.register_ffi_type(name, registration, platform=platform)
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target + suffix, handler, platform=platform)


_DIFFERENTIATED = contextvars.ContextVar("jaxmoe_differentiated", default=False)


@contextlib.contextmanager
def differentiated() -> Iterator[None]:
    """Within it calls of `dispatch` and `combine` are those of a program with gradients."""
    before = _DIFFERENTIATED.set(True)
    try:
        yield
    finally:
        _DIFFERENTIATED.reset(before)


def _kind(group: ExpertParallel, num_tokens: int) -> str:
    """What follows the name of a call: see `_call`."""
    latency = num_tokens <= group.latency_tokens and not _DIFFERENTIATED.get()
    return RECORDED if latency else ""


def register_products(lib: Any) -> None:
    """Make the handlers of the library of grouped products known to XLA."""
    for target in PRODUCT_TARGETS:
        handler = jax.ffi.pycapsule(getattr(lib, target))
        jax.ffi.register_ffi_target(target, handler, platform="CUDA")


def dispatch(
    group: ExpertParallel,
    site: int,
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
) -> tuple[Any, Float32[Array, " C"], Plan]:
    """Custom call for `reference.dispatch`."""
    if x.shape[0] == 0:  # XLA drops calls on empty arrays, on all devices alike
        return reference.dispatch(group, site, x, expert_ids, weights)
    target = "jaxmoe_dispatch{}" + _kind(group, x.shape[0])
    return _dispatch(group, site, target, (x, expert_ids, weights))


def dispatch_start(
    group: ExpertParallel, site: int, x: jax.Array, expert_ids: jax.Array, weights: jax.Array
) -> Int32[Array, " 4"]:
    """Send tokens. What `dispatch_done` goes by."""
    return _start("jaxmoe_dispatch_start", group, site, (x, expert_ids, weights))


def dispatch_done(
    group: ExpertParallel,
    site: int,
    token: Int32[Array, " 4"],
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
) -> tuple[Any, Float32[Array, " C"], Plan]:
    """Receive tokens; the results of `dispatch`."""
    return _dispatch(group, site, "jaxmoe_dispatch{}_done", (x, expert_ids, weights), (token,))


def _start(
    target: str, group: ExpertParallel, site: int, operands: tuple[jax.Array, ...]
) -> Int32[Array, " 4"]:
    return _call(target, group, site, operands, (((4,), I32),))[0]


def _dispatch(
    group: ExpertParallel,
    site: int,
    target: str,
    operands: tuple[jax.Array, jax.Array, jax.Array],
    token: tuple[jax.Array, ...] = (),
) -> tuple[Any, Float32[Array, " C"], Plan]:
    """A call that makes rows; `target` has a place for the kind of rows."""
    x, (num_tokens, top_k) = operands[0], operands[1].shape
    capacity = group.capacity(num_tokens)
    outputs = (
        ((capacity, group.dim), x.dtype),
        ((capacity,), F32),
        ((group.num_local_experts,), I32),
        ((), I32),
        ((), I32),
        ((), I32),
        ((group.num_devices, num_tokens, top_k), I32),
        ((capacity,), I32),
        ((num_tokens, top_k), I32),
    )
    if group.rows_dtype is None:
        call = functools.partial(_call, target.format(""), group, site, (*token, *operands))
        rows, row_weights, *plan = call(outputs)
        return rows, row_weights, Plan(*plan)
    call = functools.partial(_call, target.format("_fp8_rows"), group, site, (*token, *operands))
    values_out = ((capacity, group.dim), group.rows_dtype)
    scales_out = ((capacity, wire.num_blocks(group.dim)), F32)
    values, row_weights, *plan, scales = call((values_out, *outputs[1:], scales_out))
    return wire.QuantizedRows(values, scales), row_weights, Plan(*plan)


def combine(
    group: ExpertParallel,
    site: int,
    expert_rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """Custom call for `reference.combine`."""
    num_tokens = plan.row_map.shape[1]
    if num_tokens == 0:
        return reference.combine(group, site, expert_rows, row_weights, plan)
    operands = (expert_rows, row_weights, plan.row_map)
    outputs = (((num_tokens, group.dim), expert_rows.dtype),)
    return _call("jaxmoe_combine" + _kind(group, num_tokens), group, site, operands, outputs)[0]


def combine_start(
    group: ExpertParallel, site: int, expert_rows: jax.Array, row_weights: jax.Array, plan: Plan
) -> Int32[Array, " 4"]:
    """Send sums of rows. What `combine_done` goes by."""
    operands = (expert_rows, row_weights, plan.row_map)
    return _start("jaxmoe_combine_start", group, site, operands)


def combine_done(
    group: ExpertParallel,
    site: int,
    token: Int32[Array, " 4"],
    expert_rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """Receive sums of rows; the result of `combine`."""
    operands = (token, expert_rows, row_weights, plan.row_map)
    outputs = (((plan.row_map.shape[1], group.dim), expert_rows.dtype),)
    return _call("jaxmoe_combine_done", group, site, operands, outputs)[0]


def dispatch_grad(
    group: ExpertParallel,
    site: int,
    d_rows: Float[Array, "C D"],
    d_row_weights: Float32[Array, " C"],
    plan: Plan,
) -> tuple[Float[Array, "T D"], Float32[Array, "T K"]]:
    """Custom call for `reference.dispatch_grad`."""
    _, num_tokens, top_k = plan.row_map.shape
    if num_tokens == 0:
        return reference.dispatch_grad(group, site, d_rows, d_row_weights, plan)
    operands = (d_rows, d_row_weights, plan.row_map, plan.choice_device)
    outputs = (((num_tokens, group.dim), d_rows.dtype), ((num_tokens, top_k), F32))
    d_x, d_weights = _call("jaxmoe_dispatch_grad", group, site, operands, outputs)
    return d_x, d_weights


def combine_grad(
    group: ExpertParallel,
    site: int,
    d_y: Float[Array, "T D"],
    expert_rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
) -> tuple[Float[Array, "C D"], Float32[Array, " C"]]:
    """Custom call for `reference.combine_grad`."""
    if d_y.shape[0] == 0:
        return reference.combine_grad(group, site, d_y, expert_rows, row_weights, plan)
    # Hosts go by the rows and read row_source, GPUs by the tokens and read the others.
    places = (plan.row_source, plan.row_map, plan.choice_device, plan.num_rows)
    operands = (d_y, expert_rows, row_weights, *places)
    outputs = ((expert_rows.shape, expert_rows.dtype), (row_weights.shape, F32))
    d_rows, d_row_weights = _call("jaxmoe_combine_grad", group, site, operands, outputs)
    return d_rows, d_row_weights


def grouped_matmul(
    x: Float[Array, "C D"], w: Float[Array, "L D F"], group_sizes: Int32[Array, " L"]
) -> Float[Array, "C F"]:
    """Rows times the matrix of their group; zeros past the last group."""
    return _product("jaxmoe_grouped_matmul", (x, w, group_sizes), (x.shape[0], w.shape[2]))[0]


def grouped_input_grad(
    d_y: Float[Array, "C F"], w: Float[Array, "L D F"], group_sizes: Int32[Array, " L"]
) -> Float[Array, "C D"]:
    """Rows times the transposed matrix of their group; zeros past the last group."""
    shape = (d_y.shape[0], w.shape[1])
    return _product("jaxmoe_grouped_input_grad", (d_y, w, group_sizes), shape)[0]


def grouped_input_grad_of_two(
    d_y: Float[Array, "C F"],
    w: Float[Array, "L D F"],
    d_y2: Float[Array, "C F"],
    w2: Float[Array, "L D F"],
    group_sizes: Int32[Array, " L"],
) -> Float[Array, "C D"]:
    """The sum of two input gradients, rounded once."""
    shape = (d_y.shape[0], w.shape[1])
    operands = (d_y, w, d_y2, w2, group_sizes)
    return _product("jaxmoe_grouped_input_grad_of_two", operands, shape)[0]


def grouped_weight_grad(
    x: Float[Array, "C D"], d_y: Float[Array, "C F"], group_sizes: Int32[Array, " L"]
) -> Float[Array, "L D F"]:
    """`x_g^T d_y_g` over the rows of each group."""
    shape = (group_sizes.shape[0], x.shape[1], d_y.shape[1])
    return _product("jaxmoe_grouped_weight_grad", (x, d_y, group_sizes), shape)[0]


def grouped_swiglu(
    x: Float[Array, "C D"],
    gate: Float[Array, "L D F"],
    up: Float[Array, "L D F"],
    group_sizes: Int32[Array, " L"],
    *,
    save: bool,
) -> list[Float[Array, "C F"]]:
    """[silu(x gate) * (x up)], and with `save` x gate and x up after it."""
    target = "jaxmoe_grouped_swiglu_saving" if save else "jaxmoe_grouped_swiglu"
    shape = (x.shape[0], gate.shape[2])
    return _product(target, (x, gate, up, group_sizes), *[shape] * (3 if save else 1))


def grouped_fp8(
    x: wire.QuantizedRows,
    values: Float[Array, "L F D"],
    scales: Float32[Array, "L P B"],
    group_sizes: Int32[Array, " L"],
) -> Float[Array, "C F"]:
    """FP8 rows times the FP8 matrix of their group in bfloat16; zeros past the last group."""
    operands = (x.values, x.scales, values, scales, group_sizes)
    shape = (x.shape[0], values.shape[1])
    return _product("jaxmoe_grouped_fp8", operands, shape, dtype=jnp.bfloat16)[0]


def _product(
    target: str, operands: tuple[jax.Array, ...], *shapes: tuple[int, ...], dtype: Any = None
) -> list[jax.Array]:
    like = jax.typeof(operands[0])
    outputs = [like.update(shape=shape, dtype=dtype or like.dtype) for shape in shapes]
    claims = like.update(shape=(1,), dtype=jnp.int32)  # memory for the kernel, of no use here
    call = jax.ffi.ffi_call(target, [*outputs, claims], vmap_method="sequential")
    return list(call(*operands))[:-1]


def _call(
    target: str,
    group: ExpertParallel,
    site: int,
    operands: tuple[jax.Array, ...],
    outputs: tuple[tuple[tuple[int, ...], Any], ...],
) -> list[jax.Array]:
    """One custom call. Its first operand says which device of which slice this is.

    All devices must run the calls of a group in the same order, and on GPUs data alone does not
    tell it: in a gradient the calls of two layers, and a combine and its gradient, may not depend
    on each other. So most calls are put on XLA's stream for collectives, where they run in the
    order of the program, one after the other, and never beside a collective. In a command buffer
    there are no streams, so these calls cannot be recorded in one.

    In decoding the recording is worth more: calls for few tokens without gradients, and those in
    two halves, are ordinary calls. XLA records them one after the other, or with
    `xla_gpu_command_buffer_scheduling_mode=CONCURRENT` (docs/decode.md) by their data alone. They
    have no order against collectives, nor against calls of the other kind, but by data.
    """
    config = {
        "group": np.int64(group.uid),
        "site": np.int64(site),
        "num_devices": np.int64(group.num_devices),
        "num_experts": np.int64(group.num_experts),
        "top_k": np.int64(group.top_k),
        "wire": np.int64(_wire_format(group)),
    }
    # Typed like an operand: a bare ShapeDtypeStruct would be taken as equal on all devices.
    like = jax.typeof(operands[0])
    avals = [like.update(shape=shape, dtype=jnp.dtype(dtype)) for shape, dtype in outputs]
    call = jax.ffi.ffi_call(target + suffix_of(group.transport), avals, vmap_method="sequential")
    run: Callable[..., Any] = functools.partial(call, config=config)
    recorded = target.endswith(RECORDED) or target in SPLIT_TARGETS
    if group.transport != "cpu" and not recorded:
        run = _beside_no_collective(run)
    return list(run(_where(group), *operands))


def _wire_format(group: ExpertParallel) -> int:
    """`WireFormat` of xla_ffi/common/config.h."""
    return 0 if group.wire_dtype is None else 1 + wire.SCALES.index(group.wire_scale)


def _beside_no_collective(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on XLA's stream for collectives, so that it never runs beside one of them.

    Our kernels fill the GPU and wait for peers, and so do NCCL's: two devices that begin with
    different ones would wait for each other for ever. Needs JAX 0.11.1; with an older one, or with
    JAXMOE_GPU_STREAM=compute in the environment, the program must keep them apart by data.
    """
    if jax.__version_info__ < (0, 11, 1) or os.environ.get("JAXMOE_GPU_STREAM") == "compute":
        return run
    # By name: for a type checker with an older JAX it has another signature.
    compute_on: Any = importlib.import_module("jax.experimental.compute_on").compute_on
    wrapped: Callable[..., Any] = compute_on(
        run, compute_type="gpu_stream:collective", out_memory_spaces=jax.memory.Space.Device
    )
    return wrapped


def _where(group: ExpertParallel) -> Int32[Array, " 2"]:
    """[device on the expert axis, slice along the other axes]."""
    if group.mesh is None:
        return jnp.zeros(2, I32)
    sizes, slice_id = dict(group.spec.axis_sizes), jnp.zeros((), I32)
    for axis in group.spec.other_axes:
        if sizes[axis] > 1:
            slice_id = slice_id * I32(sizes[axis]) + lax.axis_index(axis).astype(I32)
    return jnp.stack([lax.axis_index(group.axis).astype(I32), slice_id])
