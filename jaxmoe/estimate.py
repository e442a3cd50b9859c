"""`estimate`: bytes on the wire, memory and floor times of MoE layers, before anything is built.

For routing that chooses K of E experts at random, all sets alike. Skewed routing reaches fewer
devices per token and keeps one of them busier; `imbalance` scales the expert computation.
Plain Python: nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import fractions
import math

from jaxmoe import latency


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of the MoE layers.

    Attributes:
      dim, hidden_dim: D and F.
      num_experts, top_k: E and K.
      num_layers: MoE layers.
      num_shared_experts: experts of width F that every token uses.
      dtype_bytes: bytes of an element of tokens, rows and weights in the computation.
      capacity_factor: of `ExpertParallel`; None for the worst case.
      fp8_wire: `wire_dtype` of `ExpertParallel` is float8_e4m3fn; a row of dispatch then has
        D + 4 ceil(D / 128) bytes on the wire.
    """

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    num_layers: int = 1
    num_shared_experts: int = 0
    dtype_bytes: int = 2
    capacity_factor: float | None = 1.25
    fp8_wire: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "hidden_dim", "num_experts", "top_k", "num_layers", "dtype_bytes"):
            _check_positive("Model", name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(
                f"`Model`: top_k ({self.top_k}) is more than num_experts ({self.num_experts}). "
                "Lower top_k."
            )


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and what they can do; the default is a node of 8 H100 SXM.

    Attributes:
      num_devices, devices_per_node: in all, and those joined by the fast link.
      link_bytes_per_second: of a device to others of its node, each way. The default is what copies
        between H100 reach (380 of 450 GB/s nominal).
      network_bytes_per_second: of a device to other nodes, each way.
      memory_bytes, memory_bytes_per_second: of a device.
      flops: matmul operations per second of a device, in the computation's dtype.
    """

    num_devices: int = 8
    devices_per_node: int = 8
    link_bytes_per_second: float = 380e9
    network_bytes_per_second: float = 45e9
    memory_bytes: float = 80e9
    memory_bytes_per_second: float = 3.35e12
    flops: float = 989e12

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_positive("Machine", field.name, getattr(self, field.name))


@dataclasses.dataclass(frozen=True)
class Split:
    """How devices share the work: experts over ep, copies over dp, hidden width over tp.

    The devices of ep * dp hold different tokens; those of tp the same ones. Neighbours are first
    the devices of tp, then those of ep.
    """

    ep: int = 1
    dp: int = 1
    tp: int = 1

    num_devices = property(lambda self: self.ep * self.dp * self.tp)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one split costs, per device; times are floors, of one step over all layers.

    Attributes:
      split, tokens: the split, and tokens T per device and layer.
      destinations: other devices that a token goes to, expected.
      dispatch_bytes, combine_bytes: sent by a device in one layer, forward. Dispatch includes ids
        and weights, which go to every peer.
      dispatch_bytes_per_choice, combine_bytes_per_choice: the same if every choice sent its own
        row.
      capacity: rows C of the expert buffer.
      heap_bytes: symmetric memory of a group on GPUs, shared by all layers.
      parameter_bytes: weights; with training, gradients and optimiser state, too.
      activation_bytes: rows and hidden values that are alive at once.
      wire_seconds, expert_seconds, copy_seconds, reduce_seconds: exchange of rows; expert matmuls
        or the reading of their weights, whichever is longer; moving rows in memory; sums over tp
        and, in training, of gradients over dp.
    """

    split: Split
    tokens: int
    destinations: float
    dispatch_bytes: float
    combine_bytes: float
    dispatch_bytes_per_choice: float
    combine_bytes_per_choice: float
    capacity: int
    heap_bytes: int
    parameter_bytes: float
    activation_bytes: float
    wire_seconds: float
    expert_seconds: float
    copy_seconds: float
    reduce_seconds: float

    @property
    def memory_bytes(self) -> float:
        """All three kinds of memory."""
        return self.heap_bytes + self.parameter_bytes + self.activation_bytes

    @property
    def seconds(self) -> float:
        """The four one after the other, without overlap."""
        return self.wire_seconds + self.expert_seconds + self.copy_seconds + self.reduce_seconds


# Layout constants of xla_ffi/cuda/layout.h; a test compiles it and compares.
_CHUNK_TOKENS, _META_PARTS, _MAX_BLOCKS, _CHUNK_SLOTS, _CONTROL_BYTES = 4, 16, 160, 8, 4096
_BATCH_VECTORS, _BATCH_NUMBERS, _BATCH_SCALES, _IDS_PER_VECTOR = 32, 512, 4, 5
# Bytes of a choice's id and weight, and of a parameter in training: float32 weights, gradient and
# two moments of AdamW.
_CHOICE_BYTES, _TRAINED_BYTES = 8, 16
_SCALED_BLOCK = 128  # numbers that share a scale on an FP8 wire; `jaxmoe.wire.BLOCK`


def reach(num_experts: int, top_k: int, num_devices: int) -> float:
    """The probability that a token goes to a given device: 1 - C(E - L, K) / C(E, K), L = E / R.

    A device is missed if all K experts, drawn without replacement, are among the E - L of the
    others: the hypergeometric distribution at zero. R times it are the devices that a token
    reaches, 5.29 of 8 for E=256 and K=8, where each of the 8 choices would send a row of its own.
    (One copy per token and device is the way of DeepEP and of TensorRT-LLM's one-sided exchange.)
    """
    local = num_experts // num_devices
    missed = fractions.Fraction(
        math.comb(num_experts - local, top_k), math.comb(num_experts, top_k)
    )
    return float(1 - missed)


def heap_bytes(
    *,
    num_devices: int,
    num_local_experts: int,
    max_tokens: int,
    top_k: int,
    row_bytes: int,
    puts: bool = False,
    latency_tokens: int = 0,
    max_pending: int = 0,
) -> int:
    """Bytes of a group's symmetric heap on each GPU, region by region as in xla_ffi/cuda/layout.h.

    The largest are rows, 2 * R * max_tokens * row_bytes: a slot for every token of every source,
    twice, so that a call need not wait for the end of the one before.

    Args:
      num_devices, num_local_experts: R and L, slots for experts per device.
      max_tokens, top_k, row_bytes: of the group; a row is D elements.
      puts: whether peers on other nodes are reached through NVSHMEM.
      latency_tokens: most tokens of a call by the low-latency kernels, which have slots of their
        own.
      max_pending: of the group; how many of those calls may be split and pending.
    """
    chunks = -(-max_tokens // _CHUNK_TOKENS)
    choices = max_tokens * top_k
    staged = _align(_CHUNK_TOKENS * (row_bytes + 4 * top_k))
    id_vectors = -(-latency_tokens * top_k // _IDS_PER_VECTOR)
    marks = -(-row_bytes // (16 * _BATCH_VECTORS))
    numbers, lanes = row_bytes // 2, row_bytes // 2 % _BATCH_NUMBERS // 8
    in_fp8 = 16 * _BATCH_VECTORS * (numbers // _BATCH_NUMBERS) + 16 * min(lanes, _BATCH_VECTORS)
    in_fp8 += 8 * (1 + _BATCH_SCALES) * -(-numbers // _BATCH_NUMBERS)
    wire_row = -(-(max(row_bytes + 8 * marks, in_fp8) + 8 * top_k) // 128) * 128
    parts = 2 + (2 + 2 * max_pending if max_pending else 0)
    regions = (
        _CONTROL_BYTES,
        parts * num_devices * 8,
        num_devices * _META_PARTS * 8,
        2 * num_devices * chunks * 8,
        _MAX_BLOCKS * num_local_experts * 4,
        2 * num_devices * choices * 4,
        2 * num_devices * choices * 4,
        2 * num_devices * max_tokens * row_bytes,
        _MAX_BLOCKS * _CHUNK_SLOTS * staged if puts else 0,
        parts * num_devices * id_vectors * 16,
        parts * num_devices * latency_tokens * wire_row,
    )
    return sum(map(_align, regions))


def estimate(
    model: Model,
    machine: Machine,
    split: Split,
    batch_tokens: int,
    *,
    training: bool = True,
    remat: bool = False,
    imbalance: float = 1.0,
) -> Estimate:
    """Bytes, memory and floor times of one split.

    With T tokens per device, R = ep, p of `reach` and b bytes per element:

    dispatch sends (R - 1) p T rows of D b bytes (in FP8: see `Model`) and (R - 1) T K ids and
    weights; combine sends as many rows of D b bytes back, because a device sums a token's rows
    first. Without that saving both send K T (R - 1) / R rows. Training runs the exchange twice (the
    gradient of each is the other, never in FP8) and the matmuls three times.

    Args:
      batch_tokens: tokens of a step, all devices together.
      training: with gradients, optimiser state and the backward pass.
      remat: layers are computed again in the backward pass, so that only one's rows are kept.
      imbalance: load of the busiest device by the mean (`jaxmoe.balance.imbalance`).

    Raises:
      ValueError: a split that does not fit the model, the machine or the batch.
    """
    _check_split(model, machine, split, batch_tokens)
    tokens = -(-batch_tokens // (split.ep * split.dp))
    row = model.dim * model.dtype_bytes
    sent = model.dim + 4 * -(-model.dim // _SCALED_BLOCK) if model.fp8_wire else row
    capacity = _capacity(model, split, tokens)
    probability = reach(model.num_experts, model.top_k, split.ep)
    others = split.ep - 1
    metadata = others * tokens * model.top_k * _CHOICE_BYTES
    rows = others * probability * tokens
    per_choice = model.top_k * tokens * others / split.ep
    passes = 2 if training else 1
    forward, backward = rows * (sent + row) + metadata, 2 * rows * row + metadata
    bytes_sent = forward + backward if training else forward
    wire = model.num_layers * _wire_seconds(machine, split, bytes_sent)
    return Estimate(
        split=split,
        tokens=tokens,
        destinations=others * probability,
        dispatch_bytes=rows * sent + metadata,
        combine_bytes=rows * row,
        dispatch_bytes_per_choice=per_choice * sent + metadata,
        combine_bytes_per_choice=per_choice * row,
        capacity=capacity,
        heap_bytes=_heap(model, machine, split, tokens),
        parameter_bytes=_parameters(model, split)
        * (_TRAINED_BYTES if training else model.dtype_bytes),
        activation_bytes=_activations(model, split, tokens, capacity, training, remat),
        wire_seconds=wire,
        expert_seconds=_expert_seconds(model, machine, split, tokens, training, imbalance),
        copy_seconds=passes
        * model.num_layers
        * _copies(model, tokens)
        * row
        / machine.memory_bytes_per_second,
        reduce_seconds=_reduce_seconds(model, machine, split, tokens, training),
    )


def splits(
    model: Model, machine: Machine, batch_tokens: int, **options: bool | float
) -> list[Estimate]:
    """All splits of the machine that fit the model and the memory, the fastest first.

    Args:
      options: of `estimate`.

    Raises:
      ValueError: if none fits; with the one that needs the least memory.
    """
    found = []
    for ep in _divisors(machine.num_devices):
        for tp in _divisors(machine.num_devices // ep):
            split = Split(ep, machine.num_devices // (ep * tp), tp)
            fits = model.num_experts % ep == 0 and model.hidden_dim % tp == 0
            if fits and batch_tokens >= ep * split.dp:
                found.append(estimate(model, machine, split, batch_tokens, **options))  # type: ignore[arg-type]
    fitting = [e for e in found if e.memory_bytes <= machine.memory_bytes]
    if not fitting:
        least = min(found, key=lambda e: e.memory_bytes, default=None)
        what = (
            "no split divides the experts"
            if least is None
            else (
                f"{least.split} needs the least memory, {least.memory_bytes / 1e9:.1f} of "
                f"{machine.memory_bytes / 1e9:.1f} GB per device"
            )
        )
        raise ValueError(
            f"`splits`: no split of {machine.num_devices} devices fits; {what}. Use more devices, "
            "a smaller batch or capacity_factor, or remat."
        )
    return sorted(fitting, key=lambda e: (e.seconds, e.memory_bytes))


def _heap(model: Model, machine: Machine, split: Split, tokens: int) -> int:
    row_bytes = model.dim * model.dtype_bytes
    puts = split.ep * split.tp > machine.devices_per_node
    latency_tokens = (
        0 if puts else latency.tokens_of("auto", tokens, split.ep, model.top_k, row_bytes)
    )
    return heap_bytes(
        num_devices=split.ep,
        num_local_experts=model.num_experts // split.ep,
        max_tokens=tokens,
        top_k=model.top_k,
        row_bytes=row_bytes,
        puts=puts,
        latency_tokens=latency_tokens,
    )


def _capacity(model: Model, split: Split, tokens: int) -> int:
    """Rows of `ExpertParallel.capacity`."""
    worst = split.ep * tokens * model.top_k
    if model.capacity_factor is None:
        return worst
    factor = fractions.Fraction(model.capacity_factor).limit_denominator(1 << 20)
    return min(worst, math.ceil(factor * tokens * model.top_k))


def _parameters(model: Model, split: Split) -> float:
    """Parameters of a device: its experts, the router, the shared experts; tp shares the width."""
    expert = 3 * model.dim * model.hidden_dim / split.tp
    held = model.num_experts / split.ep + model.num_shared_experts
    return model.num_layers * (held * expert + model.dim * model.num_experts)


def _activations(
    model: Model, split: Split, tokens: int, capacity: int, training: bool, remat: bool
) -> float:
    """Rows in and out of the experts, the three hidden values of SwiGLU, and the tokens' x and y.

    One layer's in inference and with remat, of which training keeps each layer's x as well.
    """
    hidden = 3 * model.hidden_dim / split.tp
    shared = model.num_shared_experts * hidden * tokens
    layer = capacity * (2 * model.dim + hidden) + 2 * tokens * model.dim + shared
    kept = model.num_layers if training and not remat else 1
    inputs = model.num_layers * tokens * model.dim if training and remat else 0
    return (kept * layer + inputs) * model.dtype_bytes


def _wire_seconds(machine: Machine, split: Split, sent: float) -> float:
    """Time to send bytes evenly to all other devices of ep; both kinds of links work at once."""
    if split.ep == 1:
        return 0.0
    on_node = max(1, min(split.ep, machine.devices_per_node // split.tp))
    per_peer = sent / (split.ep - 1)
    return max(
        (on_node - 1) * per_peer / machine.link_bytes_per_second,
        (split.ep - on_node) * per_peer / machine.network_bytes_per_second,
    )


def _expert_seconds(
    model: Model, machine: Machine, split: Split, tokens: int, training: bool, imbalance: float
) -> float:
    """6 D F operations per row forward; twice as many backward. Weights are read once each time."""
    expert = model.dim * model.hidden_dim / split.tp
    rows = tokens * (imbalance * model.top_k + model.num_shared_experts)
    held = model.num_experts / split.ep + model.num_shared_experts
    passes = 3 if training else 1
    read = 3 * expert * held * model.dtype_bytes / machine.memory_bytes_per_second
    compute = 6 * expert * rows / machine.flops
    return passes * model.num_layers * max(compute, read)


def _copies(model: Model, tokens: int) -> float:
    """Rows read and written by dispatch, which expands tokens, and by combine, which sums them."""
    return 2 * tokens * (model.top_k + 1)


def _reduce_seconds(
    model: Model, machine: Machine, split: Split, tokens: int, training: bool
) -> float:
    """All-reduces by ring, 2 (n - 1) / n of the bytes: y over tp; float32 gradients over dp."""
    row = model.dim * model.dtype_bytes
    over_tp = 2 * (split.tp - 1) / split.tp * tokens * row * model.num_layers
    seconds = over_tp * (2 if training else 1) / _bandwidth(machine, split.tp)
    if training:
        over_dp = 2 * (split.dp - 1) / split.dp * _parameters(model, split) * 4
        seconds += over_dp / _bandwidth(machine, split.num_devices)
    return seconds


def _bandwidth(machine: Machine, span: int) -> float:
    """Of a ring over so many neighbouring devices."""
    if span <= machine.devices_per_node:
        return machine.link_bytes_per_second
    return machine.network_bytes_per_second


def _align(size: int) -> int:
    return -(-size // 256) * 256


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _check_split(model: Model, machine: Machine, split: Split, batch_tokens: int) -> None:
    if split.num_devices != machine.num_devices:
        raise ValueError(
            f"`estimate`: ep x dp x tp ({split.ep} x {split.dp} x {split.tp}) must be the "
            f"{machine.num_devices} devices of the machine."
        )
    for name, count, parts, of in (
        ("num_experts", model.num_experts, split.ep, "ep"),
        ("hidden_dim", model.hidden_dim, split.tp, "tp"),
    ):
        if count % parts:
            raise ValueError(
                f"`estimate`: {name} ({count}) must be divisible by {of} ({parts}). Use one of "
                f"{_divisors(count)}."
            )
    if batch_tokens < 1:
        raise ValueError(f"`estimate`: batch_tokens must be at least 1, got {batch_tokens}.")


def _check_positive(kind: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{kind}`: {name} must be a positive number, got {value}.")
