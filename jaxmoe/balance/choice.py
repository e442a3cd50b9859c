"""Which replica of its expert a token goes to, and gradients that keep the replicas equal."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from jaxmoe._vma import vary_alike
from jaxmoe.balance.placement import Placement, slots_per_device
from jaxmoe.routing import Locality

I32, F32 = jnp.int32, jnp.float32
_TIED_BYTES, _TIED_EXPERTS = 1 << 28, 4


class NearReplicas(NamedTuple):
    """The replicas that one device sends to: for each expert a run of its slots.

    Slots ascend, and with them devices and nodes, so that the replicas of one device or node are
    neighbours in `Placement.expert_slots`.

    Attributes:
      slots: [E, M] `Placement.expert_slots`.
      first: [E] where the run begins.
      num: [E] its length, at least 1.
      offset: [E] what this device's count starts at, so that devices without a replica of their own
        start at different ones.
    """

    slots: Int32[Array, "E M"]
    first: Int32[Array, " E"]
    num: Int32[Array, " E"]
    offset: Int32[Array, " E"]


def near_replicas(
    placement: Placement,
    device: Int32[Array, ""] | int,
    *,
    num_devices: int,
    devices_per_node: int | None = None,
) -> NearReplicas:
    """For each expert the nearest replicas: those on this device, else those on its node, else all.

    Args:
      placement: of one layer.
      device: this device's index on the expert axis.
      num_devices: R.
      devices_per_node: consecutive devices that share a node; None where no distinction is wanted.
    """
    width = slots_per_device(placement.num_slots, num_devices, "near_replicas")
    per_node = devices_per_node or 1
    if num_devices % per_node:
        raise ValueError(
            f"`near_replicas`: num_devices ({num_devices}) must be divisible by devices_per_node "
            f"({per_node}). Use None to leave nodes out."
        )
    slots, device = jnp.asarray(placement.expert_slots, I32), jnp.asarray(device, I32)
    node, held = device // I32(per_node), slots >= 0
    home = slots // I32(width)
    home_node = home // I32(per_node)
    on_device, on_node = held & (home == device), held & (home_node == node)
    # Slots ascend, so that what lies below this device or node comes first in its row. All counts
    # are one sum, for few kernels.
    num_here, num_on_node, num, before_device, before_node, devices_below, nodes_below = _counts(
        on_device,
        on_node,
        held,
        held & (home < device),
        held & (home_node < node),
        # Devices that share a run are numbered: within the node by those below without a replica,
        # else over all nodes without one.
        on_node & (home < device) & _first_of_equals(home),
        held & (home_node < node) & _first_of_equals(home_node),
    )
    any_here, any_on_node = num_here > 0, num_on_node > 0
    first = jnp.where(any_here, before_device, jnp.where(any_on_node, before_node, I32(0)))
    offset = jnp.where(
        any_on_node, device % I32(per_node) - devices_below, device - I32(per_node) * nodes_below
    )
    return NearReplicas(
        slots,
        first,
        jnp.where(any_here, num_here, jnp.where(any_on_node, num_on_node, num)),
        jnp.where(any_here, I32(0), offset),
    )


def locality_of(
    placement: Placement | None,
    device: Int32[Array, ""] | int,
    *,
    num_experts: int,
    num_devices: int,
    devices_per_node: int | None = None,
) -> Locality:
    """How far each expert's nearest replica is, and its node, for `jaxmoe.route`.

    An expert counts for the node of its first slot. Hierarchical `place` keeps all replicas of an
    expert on one node; then `RouterConfig.top_nodes` bounds the nodes that a token reaches.

    Args:
      placement: of one layer; None where slot e holds expert e.
      device: this device's index on the expert axis.
      num_experts: E.
      num_devices: R.
      devices_per_node: consecutive devices that share a node; None: all do.
    """
    num_slots = num_experts if placement is None else placement.num_slots
    width = slots_per_device(num_slots, num_devices, "locality_of")
    per_node = I32(devices_per_node or num_devices)
    if placement is None:
        slots = jnp.arange(num_experts, dtype=I32)[:, None]
    else:
        slots = jnp.asarray(placement.expert_slots, I32)
    device, home, held = jnp.asarray(device, I32), slots // I32(width), slots >= 0
    on_node = jnp.any(held & (home // per_node == device // per_node), -1)
    here = jnp.any(held & (home == device), -1)
    distance = jnp.where(here, I32(0), jnp.where(on_node, I32(1), I32(2)))
    return Locality(distance, home[:, 0] // per_node)


def choose_replicas(
    near: NearReplicas, expert_ids: Int32[Array, "T K"], *, exact: bool = False
) -> Int32[Array, "T K"]:
    """The slot that each choice goes to: a nearest replica of its expert.

    Choice (t, k) of expert e goes to slot `slots[e, first[e] + (n + offset[e]) % num[e]]`. The same
    input gives the same slots.

    Args:
      near: of this device, see `near_replicas`.
      expert_ids: [T, K] experts of this device's tokens; -1 is no expert.
      exact: False: n = t, so that the tokens take turns: no work beyond two look-ups, and as even
        as an expert's tokens are spread over the batch. True: n is the number of the device's
        earlier choices of e, so that the replicas of a run get equally many, plus or minus one; it
        costs a sort of T * K ids.

    Returns:
      [T, K] slots from 0 to P - 1, the `expert_ids` of `dispatch`. -1 stays; other ids that are no
      expert become -2, which `dispatch` counts as invalid.
    """
    num_experts = near.num.shape[0]
    known = (expert_ids >= 0) & (expert_ids < num_experts)
    expert = jnp.where(known, expert_ids, I32(0))
    token = lax.broadcasted_iota(I32, expert_ids.shape, 0)
    nth = _occurrence(expert_ids) if exact else token
    nth = near.first[expert] + (nth + near.offset[expert]) % near.num[expert]
    slot = near.slots[expert, nth]
    return jnp.where(known, slot, jnp.where(expert_ids == -1, I32(-1), I32(-2)))


def tie_replicas(
    weights: Any, placement: Placement, rank: Int32[Array, ""] | int, axis: tuple[str, ...]
) -> Any:
    """The weights, with gradients that are the sum over all replicas of an expert.

    Replicas with equal weights and equal gradients stay equal, and each gets the gradient that the
    one expert would have without replication. Memory beyond the gradients is that of a few experts
    in float32, `_TIED_BYTES` for the sums or one expert's if that is more; on the wire each
    replicated expert is summed over the whole axis. Empty slots get what they get: 0.

    Args:
      weights: a pytree of this device's arrays [L, ...], one row per slot.
      placement: of this layer; replicated.
      rank: this device's index on the expert axis.
      axis: the expert axes; () without a mesh.
    """
    if placement.num_slots == placement.num_experts:
        return weights  # every expert has one slot
    leaves, treedef = jax.tree.flatten(weights)
    held, counts = (jnp.asarray(a, I32) for a in (placement.slot_experts, placement.counts))
    tied = _tie(axis, leaves, held, counts, jnp.asarray(rank, I32))
    return jax.tree.unflatten(treedef, tied)


# y = x for each replica of one expert w: x_r = w, hence d_w = sum_r d_x_r, and every replica is
# given d_w, so that the same update is applied to all of them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tie(axis: tuple[str, ...], leaves: Any, held: Any, counts: Any, rank: Any) -> Any:
    return leaves


def _tie_fwd(axis: tuple[str, ...], leaves: Any, held: Any, counts: Any, rank: Any) -> Any:
    return leaves, (held, counts, rank)


def _tie_bwd(axis: tuple[str, ...], residuals: Any, grads: Any) -> Any:
    held, counts, rank = residuals
    num_local, num_experts = grads[0].shape[0], counts.shape[0]
    num_extra = held.shape[0] - num_experts
    most = min(num_experts, num_extra)  # experts that can have replicas
    batch = _experts_at_once(grads, most)
    # Those that have come first; the last batch may reach beyond the end, where no expert is.
    order = jnp.argsort(counts < 2, stable=True)[:most].astype(I32)
    order = jnp.pad(order, (0, batch), constant_values=num_experts)
    mine = lax.dynamic_slice_in_dim(held, rank * I32(num_local), num_local)
    # Slots of this device that a batch can have: one per expert, and those beyond.
    most_slots = min(num_local, batch + num_extra)

    def tie(begin: Any, grads: Any) -> Any:
        in_slot = lax.dynamic_slice_in_dim(order, begin, batch)[:, None] == mine  # [batch, L]
        sums = _sum_here(in_slot, grads)
        totals = [t.astype(g.dtype) for t, g in zip(_psum(sums, axis), grads, strict=True)]
        totals = _like(totals, grads)
        is_tied = jnp.any(in_slot, 0)
        slots = jnp.argsort(~is_tied, stable=True)[:most_slots].astype(I32)
        nowhere = num_local + jnp.arange(most_slots, dtype=I32)
        put = jnp.where(is_tied[slots], slots, nowhere)
        expert = jnp.argmax(in_slot, 0)[slots]
        return [
            g.at[put].set(t[expert], mode="drop", unique_indices=True)
            for g, t in zip(grads, totals, strict=True)
        ]

    if batch == most:
        return tie(I32(0), grads), None, None, None
    num_replicated = jnp.sum(counts > 1, dtype=I32)
    # Only the number of steps is common to all devices: they meet in each.
    _, grads = lax.while_loop(
        lambda c: c[0] < num_replicated, lambda c: (c[0] + I32(batch), tie(*c)), (I32(0), grads)
    )
    return grads, None, None, None


def _experts_at_once(grads: Any, most: int) -> int:
    """A few, as far as they fit in `_TIED_BYTES`: a step of a loop on a GPU has the host wait for
    it, and small collectives take long for their bytes; but experts of a batch that turn out to
    have no replicas are summed in vain. 8 virtual devices, 4 of 32 experts replicated, of at most
    16: a training step took 1.08 times that of uniform routing in batches of 4, 1.12 in one of 16
    (benchmarks/results/2026-11-22-skewed-step-host-2-cores.txt).
    """
    expert_bytes = sum(4 * math.prod(g.shape[1:]) for g in grads)
    return max(1, min(most, _TIED_EXPERTS, _TIED_BYTES // max(expert_bytes, 1)))


def _sum_here(in_slot: Any, grads: Any) -> Any:
    """float32 sums [batch, ...] of the gradients of this device's slots, `in_slot` [batch, L]."""
    nth = jnp.cumsum(in_slot, axis=1, dtype=I32)

    def rows(n: Any) -> list[Array]:
        """The n-th replica of each expert here, zeros where there is none."""
        found = in_slot & (nth == n)
        any_found, slot = jnp.any(found, 1), jnp.argmax(found, 1)

        def take(g: Any) -> Any:
            row = g[slot].astype(F32)
            return jnp.where(any_found.reshape(-1, *(1,) * (g.ndim - 1)), row, F32(0))

        return [take(g) for g in grads]

    def add(n: Any, sums: Any) -> Any:
        return [s + r for s, r in zip(sums, rows(n), strict=True)]

    # Placements with `distinct` have one at most.
    return lax.fori_loop(I32(2), jnp.max(nth) + 1, add, _like(rows(I32(1)), grads))


_tie.defvjp(_tie_fwd, _tie_bwd)


def _psum(tree: Any, axis: tuple[str, ...]) -> Any:
    return lax.psum(tree, axis) if axis else tree


def _like(arrays: list[Array], models: list[Array]) -> list[Array]:
    """`arrays` typed as varying over what their models vary over."""
    return [vary_alike((a, m))[0] for a, m in zip(arrays, models, strict=True)]


def _counts(*masks: Array) -> Array:
    """How many of each row of each mask: [masks, rows]."""
    return jnp.sum(jnp.stack(masks), -1, dtype=I32)


def _first_of_equals(values: Array) -> Array:
    """Whether a value differs from the one before it in its row; equal ones are neighbours."""
    return values != jnp.pad(values, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]


def _occurrence(expert_ids: Array) -> Array:
    """How many earlier choices fell on the same expert; shaped like `expert_ids`."""
    if expert_ids.size == 0:
        return expert_ids
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(I32)
    ordered = flat[order]
    index = jnp.arange(flat.size, dtype=I32)
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    start = lax.cummax(jnp.where(new, index, I32(0)))
    return jnp.zeros_like(flat).at[order].set(index - start).reshape(expert_ids.shape)
