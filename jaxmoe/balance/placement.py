"""`Placement`: which expert lies in which slot of which device, as arrays that a program takes.

A *slot* is room for one expert on a device. With R devices of S slots, slot p lies on device
`p // S`; P = R * S is what the group calls `num_experts`, and E is the number of experts that the
router knows. An expert in several slots has that many *replicas*.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the experts lie. A pytree of int32 arrays and nothing else.

    All may have a leading dimension of layers, the same for the three; `placement[i]` is that of
    layer i. Placements of equal shapes run the same compiled program, and with the default M every
    placement of E experts in P slots has equal shapes.

    Attributes:
      slot_experts: [P] the expert in each slot ("physical to logical"); -1 for an empty slot.
      expert_slots: [E, M] the slots of each expert in ascending order ("logical to physical"),
        padded with -1.
      counts: [E] replicas of each expert, at least 1.
    """

    slot_experts: Int32[Array, "*layers P"]
    expert_slots: Int32[Array, "*layers E M"]
    counts: Int32[Array, "*layers E"]

    num_slots = property(lambda self: self.slot_experts.shape[-1])
    num_experts = property(lambda self: self.counts.shape[-1])
    max_replicas = property(lambda self: self.expert_slots.shape[-1])

    def __getitem__(self, layer: Any) -> Placement:
        """The placement of one layer, or of a slice of them."""
        if self.slot_experts.ndim < 2:
            raise IndexError("Placement: this is the placement of one layer; it has no others.")
        return Placement(self.slot_experts[layer], self.expert_slots[layer], self.counts[layer])


def placement_of(
    slot_experts: Any, num_experts: int, *, max_replicas: int | None = None
) -> Placement:
    """The `Placement` with these experts in the slots.

    Args:
      slot_experts: [..., P] integers from 0 to E - 1; -1 for an empty slot.
      num_experts: E.
      max_replicas: M; None for P - E + 1, what one expert can have at most.

    Raises:
      ValueError: an id out of range, an expert without a slot, or one with more than M.
    """
    slots = np.asarray(slot_experts)
    if slots.ndim < 1 or not np.issubdtype(slots.dtype, np.integer):
        raise ValueError(
            f"`placement_of`: slot_experts are {slots.dtype}{list(slots.shape)}; wanted integers "
            "[..., P], the expert in each slot."
        )
    num_slots = slots.shape[-1]
    flat = slots.reshape(-1, num_slots).astype(np.int32)
    counts = _count(flat, num_experts)
    room = max(1, num_slots - num_experts + 1) if max_replicas is None else max_replicas
    if counts.max(initial=0) > room:
        layer, expert = np.argwhere(counts > room)[0]
        raise ValueError(
            f"`placement_of`: expert {expert} of layer {layer} has {counts[layer, expert]} "
            f"replicas, max_replicas is {room}. Raise it, or leave it None."
        )
    # Sorted by expert, the slots of one are neighbours in ascending order; empty slots come first.
    order = np.argsort(flat, axis=-1, kind="stable").astype(np.int32)
    layers = np.arange(len(flat))[:, None]
    experts = flat[layers, order]
    starts = np.cumsum(counts, axis=-1) - counts + np.sum(flat < 0, axis=-1, keepdims=True)
    filled = experts >= 0
    nth = np.arange(num_slots) - starts[layers, np.maximum(experts, 0)]
    expert_slots = np.full((len(flat), num_experts, room), -1, np.int32)
    rows = np.broadcast_to(layers, flat.shape)[filled]
    expert_slots[rows, experts[filled], nth[filled]] = order[filled]
    lead = slots.shape[:-1]
    arrays: tuple[Any, ...] = (
        flat.reshape(slots.shape),
        expert_slots.reshape(*lead, num_experts, room),
        counts.reshape(*lead, num_experts),
    )
    return Placement(*arrays)


def contiguous(
    num_experts: int, num_slots: int | None = None, *, layers: tuple[int, ...] = ()
) -> Placement:
    """Expert e in slot e, as without a placement. Further slots hold the first experts again.

    Args:
      num_experts: E.
      num_slots: P; None for E.
      layers: leading dimensions.
    """
    num_slots = num_experts if num_slots is None else num_slots
    if num_slots < num_experts or num_experts < 1:
        raise ValueError(
            f"`contiguous`: num_slots ({num_slots}) must be at least num_experts ({num_experts}), "
            "and that at least 1. Every expert needs a slot."
        )
    slots = np.arange(num_slots, dtype=np.int32) % num_experts
    return placement_of(np.broadcast_to(slots, (*layers, num_slots)), num_experts)


def check_placement(
    placement: Placement, *, num_experts: int, num_slots: int, name: str = "placement"
) -> None:
    """Checks that a placement fits a model and a group, and that its arrays agree.

    Args:
      placement: concrete arrays; under `jax.jit` only the shapes can be checked.
      num_experts: E, experts that the router knows.
      num_slots: P, the group's `num_experts`.
      name: what the sentence calls the placement.

    Raises:
      TypeError: something else than a `Placement`.
      ValueError: a placement of another model or of another number of devices, or arrays that
        contradict one another.
    """
    check_shapes(placement, num_experts=num_experts, num_slots=num_slots, name=name)
    if isinstance(placement.slot_experts, jax.core.Tracer):
        return
    slots, table, counts = (
        np.asarray(a) for a in (placement.slot_experts, placement.expert_slots, placement.counts)
    )
    want = placement_of(slots, num_experts, max_replicas=table.shape[-1])
    for field, got in (("expert_slots", table), ("counts", counts)):
        if not np.array_equal(got, getattr(want, field)):
            raise ValueError(
                f"`{name}`: {field} contradict slot_experts. Make placements with `placement_of`."
            )


def check_shapes(
    placement: Placement, *, num_experts: int, num_slots: int, name: str = "placement"
) -> None:
    """The part of `check_placement` that needs no values."""
    if not isinstance(placement, Placement):
        raise TypeError(
            f"`{name}`: got {type(placement).__name__}, wanted a jaxmoe.balance.Placement. Make "
            "one with `place` or `contiguous`."
        )
    if placement.num_experts != num_experts:
        raise ValueError(
            f"`{name}`: it places {placement.num_experts} experts, the model has {num_experts}. "
            "It is of another model; make one from this model's load with `place`."
        )
    if placement.num_slots != num_slots:
        raise ValueError(
            f"`{name}`: it fills {placement.num_slots} slots, the group has {num_slots}. If "
            "devices left or joined the mesh, make a placement for those there are now with "
            "`place(load, num_devices=...)`, and give the group as many experts as slots."
        )


def slots_per_device(num_slots: int, num_devices: int, name: str) -> int:
    """S; refuses slots that do not divide."""
    if num_devices < 1 or num_slots % num_devices:
        raise ValueError(
            f"`{name}`: {num_slots} slots must be divisible by num_devices ({num_devices}). Use "
            f"{-(-num_slots // max(num_devices, 1)) * max(num_devices, 1)} slots, or devices "
            "that divide them."
        )
    return num_slots // num_devices


def _count(flat: np.ndarray, num_experts: int) -> np.ndarray:
    """Replicas of each expert, [layers, E]."""
    if flat.min(initial=-1) < -1 or flat.max(initial=-1) >= num_experts:
        wrong = flat[(flat < -1) | (flat >= num_experts)][0]
        raise ValueError(
            f"`placement_of`: slot_experts hold {wrong}; wanted -1 or an expert below num_experts "
            f"({num_experts}). Is the placement of another model?"
        )
    keys = np.arange(len(flat))[:, None] * (num_experts + 1) + flat + 1
    counts = np.bincount(keys.ravel(), minlength=len(flat) * (num_experts + 1))
    counts = counts.reshape(len(flat), num_experts + 1)[:, 1:].astype(np.int32)
    if not counts.all():
        layer, expert = np.argwhere(counts == 0)[0]
        raise ValueError(
            f"`placement_of`: expert {expert} of layer {layer} has no slot. Every expert needs "
            "one; add slots or take a replica of another expert away."
        )
    return counts
