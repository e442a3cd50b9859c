"""`ExpertParallel`: the sizes, the mesh axis and the transport that dispatch and combine share."""

from __future__ import annotations

import dataclasses
import fractions
import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import latency as _latency
from jaxmoe import transport as _transport
from jaxmoe import wire

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """The numbers of a group, all static. Two groups of equal spec lower to equal programs."""

    axis: tuple[str, ...]
    other_axes: tuple[str, ...]
    axis_sizes: tuple[tuple[str, int], ...]
    num_devices: int
    num_experts: int
    top_k: int
    dim: int
    max_tokens: int
    capacity_factor: float | None
    dtype: str
    timeout: float
    num_sms: int | None = None
    wire_dtype: str | None = None
    wire_scale: str = "amax"
    rows_dtype: str | None = None
    mode: str = "auto"
    max_pending: int = 0


class ExpertParallel:
    """A group of devices that share the experts of one or more MoE layers.

    Expert e lives on device `e // (num_experts / R)` of the mesh axis, where R is that axis' size.
    On a mesh with further axes there is one exchange group per slice along `axis`. A group is
    cheap to make, holds no parameters, and any number of layers and of groups live side by side.

    Args:
      mesh: the `jax.sharding.Mesh` of the enclosing `jax.shard_map`, or None for a single device
        (R = 1).
      axis: the mesh axis, or axes in major-to-minor order, over which experts are spread.
      num_experts: E, experts in all; a multiple of R.
      top_k: K, choices per token.
      dim: D, width of a token.
      max_tokens: most tokens T per device in one call. Any T up to it may be used, also different
        ones in different calls, but all devices of one call use the same T (mask with expert id
        -1).
      capacity_factor: None gives every device the worst case of R * T * K rows, so that nothing is
        ever dropped. A number gives `ceil(capacity_factor * T * K)` rows; 1.0 is what balanced
        routing needs. See `dispatch` for which choices are dropped when that is too little.
      dtype: of tokens and rows: bfloat16, float16 or float32.
      wire_dtype: jnp.float8_e4m3fn lets `dispatch` send tokens in eight bits, with a float32 scale
        for each block of 128 numbers, and about half of the bytes. It quantises in the send and
        makes rows of `dtype` again in the receive; `jaxmoe.wire` defines every bit and bounds the
        error, at most 2^-4 of a number that is not tiny against the largest of its block. Gradients
        and `combine` stay in `dtype`: the gradient of dispatch is that of the copy, as if nothing
        had been rounded. None: tokens travel in `dtype`.
      wire_scale: "amax" (the largest number of a block becomes the largest of FP8) or
        "power_of_two" (scaling is exact, as some FP8 matrix units want it).
      rows_dtype: jnp.float8_e4m3fn lets `dispatch` hand rows over as they travelled, as
        `jaxmoe.QuantizedRows` with their scales, for an FP8 matrix product; needs `wire_dtype`, and
        takes no derivative. None: rows of `dtype`.
      transport: "cpu" (this library's custom calls on the host platform), "p2p" (its kernels on
        the GPUs of one process), "nvshmem" (the same kernels, one process per GPU), "xla" (plain
        `jax.lax` collectives, any backend; also the reference) or "auto". `group.transport` says
        what was picked, `group.heap_bytes` how much memory each device reserved for it.
      mode: which kernels a GPU runs. "throughput": those for many tokens, as in training and
        prefill; "low_latency": those for few, as in decode, in which data crosses the wire once
        and nothing waits for a barrier; "auto": by the number of tokens of a call, the latter for
        up to `group.latency_tokens`. Results are the same to the bit. Gradients, other transports
        and groups that need NVSHMEM's puts have one kind for all sizes.
      max_pending: how many calls may be between their `dispatch_start` or `combine_start` and their
        done at a time, at most 8, where GPUs run low-latency kernels; each takes two further slots
        for every token of such a call. 0: a start does the whole call. `group.split_tokens` is up
        to how many tokens calls are really split.
      num_sms: most multiprocessors that a GPU kernel occupies; None for all. Only on GPUs.
      timeout: seconds that a device waits for its peers before the call fails with an error that
        names them.

    Raises:
      ValueError: for sizes, axes or options that do not fit; the message says what to use instead.
      RuntimeError: if the transport asked for cannot run here.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh | None = None,
        axis: str | Sequence[str] = "expert",
        *,
        num_experts: int,
        top_k: int,
        dim: int,
        max_tokens: int,
        capacity_factor: float | None = None,
        dtype: Any = jnp.bfloat16,
        wire_dtype: Any = None,
        wire_scale: str = "amax",
        rows_dtype: Any = None,
        transport: str = "auto",
        mode: str = "auto",
        max_pending: int = 0,
        num_sms: int | None = None,
        timeout: float = 60.0,
    ):
        axes, other_axes, sizes = _check_axes(mesh, axis)
        num_devices = math.prod(dict(sizes)[a] for a in axes)
        _check_sizes(num_experts, top_k, dim, max_tokens, num_devices, axes)
        _check_options(capacity_factor, num_sms, timeout)
        name = _check_dtype(dtype)
        wire_name, rows_name = _check_wire(name, wire_dtype, wire_scale, rows_dtype)
        _check_mode(mode, num_devices, max_tokens, top_k)
        _check_pending(max_pending)
        self.mesh = mesh
        self.spec = GroupSpec(
            axis=axes,
            other_axes=other_axes,
            axis_sizes=sizes,
            num_devices=num_devices,
            num_experts=int(num_experts),
            top_k=int(top_k),
            dim=int(dim),
            max_tokens=int(max_tokens),
            capacity_factor=None if capacity_factor is None else float(capacity_factor),
            dtype=name,
            timeout=float(timeout),
            num_sms=num_sms,
            wire_dtype=wire_name,
            wire_scale=wire_scale,
            rows_dtype=rows_name,
            mode=mode,
            max_pending=int(max_pending),
        )
        self.transport = _transport.pick(transport, mesh, self.spec)
        if num_sms is not None and self.transport in ("cpu", "xla"):
            raise ValueError(
                f"ExpertParallel: num_sms ({num_sms!r}) bounds GPU kernels, and transport "
                f"{self.transport!r} has none. Leave it None."
            )
        self._handle = _transport.open_group(self.transport, mesh, self.spec)
        self._finalizer = weakref.finalize(self, self._handle.close)
        self.layer_numbers = itertools.count()  # names for the layers that share the group

    axis = property(lambda self: self.spec.axis)
    num_devices = property(lambda self: self.spec.num_devices)
    num_experts = property(lambda self: self.spec.num_experts)
    num_local_experts = property(lambda self: self.spec.num_experts // self.spec.num_devices)
    top_k = property(lambda self: self.spec.top_k)
    dim = property(lambda self: self.spec.dim)
    max_tokens = property(lambda self: self.spec.max_tokens)
    capacity_factor = property(lambda self: self.spec.capacity_factor)
    dtype = property(lambda self: jnp.dtype(self.spec.dtype))
    timeout = property(lambda self: self.spec.timeout)
    wire_dtype = property(lambda self: _dtype_or_none(self.spec.wire_dtype))
    wire_scale = property(lambda self: self.spec.wire_scale)
    rows_dtype = property(lambda self: _dtype_or_none(self.spec.rows_dtype))
    uid = property(lambda self: self._handle.uid)
    heap_bytes = property(lambda self: self._handle.heap_bytes)
    latency_tokens = property(lambda self: self._handle.latency_tokens)
    split_tokens = property(lambda self: self._handle.split_tokens)
    max_pending = property(lambda self: self.spec.max_pending)
    closed = property(lambda self: not self._finalizer.alive)

    def capacity(self, num_tokens: int) -> int:
        """Rows C of a device's expert buffer in a call with `num_tokens` tokens per device."""
        worst = self.num_devices * num_tokens * self.top_k
        if self.capacity_factor is None:
            return worst
        factor = fractions.Fraction(self.capacity_factor).limit_denominator(1 << 20)
        return min(worst, math.ceil(factor * num_tokens * self.top_k))

    def close(self) -> None:
        """Release what the transport holds. Later use is an error; closing twice is not."""
        self._finalizer()

    def __repr__(self) -> str:
        s = self.spec
        state = ", closed" if self.closed else ""
        return (
            f"ExpertParallel(axis={s.axis}, num_devices={s.num_devices}, "
            f"num_experts={s.num_experts}, top_k={s.top_k}, dim={s.dim}, "
            f"max_tokens={s.max_tokens}, capacity_factor={s.capacity_factor}, "
            f"dtype={s.dtype}, {_wire_text(s)}transport={self.transport!r}{state})"
        )


def _wire_text(spec: GroupSpec) -> str:
    if spec.wire_dtype is None:
        return ""
    rows = "" if spec.rows_dtype is None else f"rows_dtype={spec.rows_dtype}, "
    return f"wire_dtype={spec.wire_dtype}, wire_scale={spec.wire_scale!r}, {rows}"


def _dtype_or_none(name: str | None) -> Any:
    return None if name is None else jnp.dtype(name)


def _check_axes(
    mesh: jax.sharding.Mesh | None, axis: str | Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, int], ...]]:
    """The expert axes, the other axes and the sizes of all; three times () without a mesh."""
    if mesh is None:
        return (), (), ()
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(
            f"ExpertParallel: mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}. "
            "Make one with jax.make_mesh, or pass None to use one device."
        )
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [a for a in axes if a not in mesh.axis_names]
    if missing or not axes:
        raise ValueError(
            f"ExpertParallel: axis {axis!r} is not in the mesh, whose axes are {mesh.axis_names}. "
            "Name one of these, or add the axis to jax.make_mesh."
        )
    if len(set(axes)) != len(axes):
        raise ValueError(f"ExpertParallel: axis {axis!r} names a mesh axis twice. Name each once.")
    sizes = tuple((name, int(mesh.shape[name])) for name in mesh.axis_names)
    return axes, tuple(a for a in mesh.axis_names if a not in axes), sizes


def _check_sizes(
    num_experts: int, top_k: int, dim: int, max_tokens: int, num_devices: int, axes: tuple[str, ...]
) -> None:
    for name, value, least in (
        ("num_experts", num_experts, 1),
        ("top_k", top_k, 1),
        ("dim", dim, 1),
        ("max_tokens", max_tokens, 0),
    ):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"ExpertParallel: {name} must be an integer of at least {least}, got {value!r}."
            )
    if num_experts % num_devices:
        below, above = (
            num_experts // num_devices * num_devices,
            -(-num_experts // num_devices) * num_devices,
        )
        fits = [r for r in range(1, num_experts + 1) if num_experts % r == 0]
        raise ValueError(
            f"ExpertParallel: num_experts ({num_experts}) must be divisible by the {num_devices} "
            f"devices of "
            f"mesh axis {axes[0] if len(axes) == 1 else axes!r}. Use {below or above} or {above} "
            f"experts, "
            f"or that many devices: {', '.join(map(str, fits))}."
        )
    if top_k > num_experts:
        raise ValueError(
            f"ExpertParallel: top_k ({top_k}) is more than num_experts ({num_experts}). A token "
            f"chooses "
            "distinct experts: lower top_k or add experts."
        )
    if num_devices * max_tokens * top_k >= 2**31:
        raise ValueError(
            f"ExpertParallel: {num_devices} devices x max_tokens ({max_tokens}) x top_k "
            f"({top_k}) choices do not "
            "fit 32-bit indices. Lower max_tokens and call with the batch in parts."
        )


def _check_options(capacity_factor: float | None, num_sms: int | None, timeout: float) -> None:
    if capacity_factor is not None and not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(
            f"ExpertParallel: capacity_factor must be a positive number or None, got "
            f"{capacity_factor!r}. "
            "1.0 holds balanced routing exactly; None never drops."
        )
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"ExpertParallel: num_sms must be at least 1 or None, got {num_sms!r}.")
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(
            f"ExpertParallel: timeout must be a positive number of seconds, got {timeout!r}."
        )


def _check_mode(mode: str, num_devices: int, max_tokens: int, top_k: int) -> None:
    if mode not in _latency.MODES:
        names = ", ".join(map(repr, _latency.MODES))
        raise ValueError(f"ExpertParallel: mode must be one of {names}, got {mode!r}.")
    most = _latency.most_tokens(num_devices, top_k)
    if mode == "low_latency" and max_tokens > most:
        raise ValueError(
            f"ExpertParallel: mode 'low_latency' takes at most {most} tokens per device in a group "
            f"of {num_devices} devices with top_k={top_k}, got max_tokens={max_tokens}. Lower "
            "max_tokens, or use mode 'auto', which takes the other kernels for more tokens."
        )


def _check_pending(max_pending: int) -> None:
    most = _latency.MAX_PENDING
    if isinstance(max_pending, bool) or not isinstance(max_pending, (int, np.integer)):
        raise ValueError(f"ExpertParallel: max_pending must be an integer, got {max_pending!r}.")
    if not 0 <= max_pending <= most:
        raise ValueError(
            f"ExpertParallel: max_pending must lie between 0 and {most}, got {max_pending}. It "
            "counts the calls between their start and their done; let a start depend on an earlier "
            "done to have fewer."
        )


def _check_dtype(dtype: Any) -> str:
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"ExpertParallel: dtype must be one of {', '.join(DTYPES)}, got {name}.")
    return name


def _check_wire(
    dtype: str, wire_dtype: Any, wire_scale: str, rows_dtype: Any
) -> tuple[str | None, str | None]:
    """Names of the dtypes on the wire and of the rows; None where it is that of the group."""
    names = {"wire_dtype": wire_dtype, "rows_dtype": rows_dtype}
    for option, asked in names.items():
        name = None if asked is None else jnp.dtype(asked).name
        if name not in (None, dtype, wire.DTYPE):
            raise ValueError(
                f"ExpertParallel: {option} must be {wire.DTYPE} or None (as dtype, {dtype}), got "
                f"{name}."
            )
        names[option] = None if name == dtype else name
    if wire_scale not in wire.SCALES:
        raise ValueError(
            f"ExpertParallel: wire_scale must be one of {', '.join(map(repr, wire.SCALES))}, got "
            f"{wire_scale!r}."
        )
    if names["wire_dtype"] is None and names["rows_dtype"] is not None:
        raise ValueError(
            f"ExpertParallel: rows_dtype {wire.DTYPE} hands over what came over the wire, but "
            f"wire_dtype is {dtype}. Set wire_dtype=jnp.{wire.DTYPE} as well."
        )
    if names["wire_dtype"] is None and wire_scale != "amax":
        raise ValueError(
            f"ExpertParallel: wire_scale {wire_scale!r} is of an FP8 wire, but wire_dtype is "
            f"{dtype}. Set wire_dtype=jnp.{wire.DTYPE}, or leave wire_scale out."
        )
    return names["wire_dtype"], names["rows_dtype"]
