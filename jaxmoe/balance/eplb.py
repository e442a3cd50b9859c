"""`replicate` and `place`: how many replicas each expert gets and where they lie, from its load.

The algorithm of DeepSeek's expert-parallel load balancer (EPLB; described in arXiv 2412.19437,
section 3.4), vectorised over layers, and extended to devices of different speed or memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.balance.placement import Placement, placement_of, slots_per_device


def replicate(load: Any, num_replicas: int) -> np.ndarray:
    """How many replicas each expert gets.

    Every expert gets one; each further one goes to the expert with the largest
    `load / replicas`, the lower id of two equal ones. That makes the largest load of a replica as
    small as it can be.

    Args:
      load: [..., E] tokens of each expert, of any scale.
      num_replicas: P, replicas in all, at least E.

    Returns:
      [..., E] int32 counts that sum to P.

    Raises:
      ValueError: loads that are NaN, infinite, negative or zero in total; fewer replicas than
        experts.
    """
    loads = check_load("replicate", load)
    num_experts = loads.shape[-1]
    if num_replicas < num_experts:
        raise ValueError(
            f"`replicate`: num_replicas ({num_replicas}) must be at least the {num_experts} "
            "experts of load. Every expert needs one."
        )
    counts = _replicas(loads.reshape(-1, num_experts), num_replicas, num_replicas)[1]
    return counts.reshape(loads.shape)


def place(
    load: Any,
    *,
    num_devices: int,
    num_replicas: int | None = None,
    num_nodes: int = 1,
    num_groups: int = 1,
    speeds: Sequence[float] | None = None,
    slots: Sequence[int] | None = None,
    max_replicas: int | None = None,
    distinct: bool = False,
) -> Placement:
    """Replicas for the busy experts, spread so that every device is equally busy.

    Hierarchical where num_groups is a multiple of num_nodes: groups of consecutive experts are
    packed onto nodes, so that group-limited routing keeps a token on few of them; replicas are made
    within a node; and they are packed onto its devices. Global otherwise: the same with one group
    and one node. Packing takes items by falling load, each to the device that would then be the
    least busy and has a slot left.

    Args:
      load: [E] or [layers, E] tokens of each expert, of any scale: a decayed average over steps.
      num_devices: R.
      num_replicas: P, replicas in all; None for as many as there are slots, or E without `slots`.
      num_nodes: nodes of R / num_nodes consecutive devices.
      num_groups: groups of E / num_groups consecutive experts, as in `RouterConfig`.
      speeds: [R] how fast each device is, of any scale; None for equal ones. A device gets load in
        proportion.
      slots: [R] experts for which each device has memory; None for P / R. The placement has
        max(slots) slots on every device, of which a smaller device leaves some empty.
      max_replicas: of `Placement`.
      distinct: no device holds two replicas of an expert, if that can be avoided. Two do not help
        where devices serve their own tokens first (`choose_replicas`): they get the share of one.
        False: the published algorithm, which does not look.

    Returns:
      A `Placement`, with a dimension of layers if `load` has one.

    Raises:
      ValueError: bad loads (see `replicate`), counts that do not divide, more replicas than slots.
    """
    loads = check_load("place", load)
    num_experts = loads.shape[-1]
    room = _rooms(num_devices, num_replicas, num_experts, slots)
    total = int(room.sum()) if num_replicas is None else int(num_replicas)
    if num_nodes < 1 or num_groups < 1 or num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_counts(num_experts, total, num_devices, num_nodes, num_groups, room)
    rate = check_speeds("place", speeds, num_devices)

    flat = loads.reshape(-1, num_experts)
    experts = _groups_to_nodes(flat, num_groups, num_nodes, rate)
    ordered = np.take_along_axis(flat, experts, axis=-1).reshape(-1, num_experts // num_nodes)
    most = num_devices // num_nodes if distinct else total
    made, counts = _replicas(ordered, total // num_nodes, most)
    share = np.take_along_axis(ordered / counts, made, axis=-1)
    shape = (len(share), num_devices // num_nodes)
    tiled = [np.tile(a.reshape(num_nodes, -1), (len(flat), 1)) for a in (room, rate)]
    kinds = made if distinct else None
    device, nth = pack(share, tiled[0].reshape(shape), tiled[1].reshape(shape), kinds)

    width = int(room.max())
    held = np.full((len(share), shape[1] * width), -1, np.int32)
    np.put_along_axis(held, device * width + nth, made, axis=-1)
    # From the position within a node to the expert.
    node = np.tile(np.arange(num_nodes), len(flat))[:, None]
    position = (held + node * (num_experts // num_nodes)).reshape(len(flat), -1)
    found = np.take_along_axis(experts, np.maximum(position, 0), axis=-1)
    slot_experts = np.where(held.reshape(found.shape) >= 0, found, -1)
    return placement_of(
        slot_experts.reshape(*loads.shape[:-1], -1), num_experts, max_replicas=max_replicas
    )


def device_loads(placement: Placement, load: Any, num_devices: int) -> np.ndarray:
    """The load of each device, [..., R], when an expert's load spreads evenly over its replicas.

    Args:
      placement: of any layers.
      load: [..., E], with the layers of the placement or none.
      num_devices: R.
    """
    width = slots_per_device(placement.num_slots, num_devices, "device_loads")
    slots = np.asarray(placement.slot_experts)
    share = np.asarray(load, np.float64) / np.asarray(placement.counts)
    per_slot = np.take_along_axis(share, np.maximum(slots, 0), axis=-1)
    per_slot = np.where(slots >= 0, per_slot, 0.0)
    return per_slot.reshape(*slots.shape[:-1], num_devices, width).sum(-1)


def pack(
    weights: np.ndarray, room: np.ndarray, speeds: np.ndarray, kinds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Spread items over bins: by falling weight, each to the bin that would be the least busy.

    Args:
      weights: [B, n], B independent problems.
      room: [B, m] most items of each bin; the sums are at least n.
      speeds: [B, m].
      kinds: [B, n] integers; items of one kind go to different bins as long as one has room.

    Returns:
      [B, n] the bin of each item, and its number among the items of that bin.
    """
    num_items, num_bins = weights.shape[1], room.shape[1]
    equal = bool(np.all(speeds == speeds[:, :1]))
    if equal and num_items == num_bins and np.all(room == 1):
        bins = np.broadcast_to(np.arange(num_items), weights.shape)
        return bins, np.zeros_like(bins)
    problem = np.arange(len(weights))
    order = np.argsort(-weights, axis=-1, kind="stable")
    bins, nth = np.empty(weights.shape, np.int64), np.empty(weights.shape, np.int64)
    busy = np.where(room > 0, 0.0, np.inf)
    used = np.zeros(room.shape, np.int64)
    held = None if kinds is None else np.zeros((*room.shape, int(kinds.max()) + 1), bool)
    for item in order.T:
        weight = weights[problem, item]
        # With equal speeds the smallest load decides; adding the weight could only round.
        cost = busy if equal else (busy + weight[:, None]) / speeds
        if held is not None and kinds is not None:
            kind = kinds[problem, item]
            apart = np.where(held[problem, :, kind], np.inf, cost)
            cost = np.where(np.isfinite(apart).any(-1, keepdims=True), apart, cost)
        chosen = np.argmin(cost, axis=-1)
        if held is not None:
            held[problem, chosen, kind] = True
        bins[problem, item] = chosen
        nth[problem, item] = used[problem, chosen]
        used[problem, chosen] += 1
        busy[problem, chosen] += weight
        full = used[problem, chosen] >= room[problem, chosen]
        busy[problem[full], chosen[full]] = np.inf
    return bins, nth


def check_load(name: str, load: Any) -> np.ndarray:
    """Loads as float64 [..., E]; refuses what no placement can be made from."""
    loads = np.asarray(load, np.float64)
    if loads.ndim < 1 or loads.size == 0:
        raise ValueError(
            f"`{name}`: load has shape {list(loads.shape)}; wanted [..., E], a number per expert."
        )
    if not np.all(np.isfinite(loads)) or loads.min() < 0:
        wrong = loads[~(np.isfinite(loads) & (loads >= 0))][0]
        raise ValueError(
            f"`{name}`: load holds {wrong}; wanted finite numbers of at least 0. Leave out the "
            "steps whose loss was not finite."
        )
    totals = loads.reshape(-1, loads.shape[-1]).sum(-1)
    if not totals.all():
        raise ValueError(
            f"`{name}`: load of layer {np.argmin(totals != 0)} is zero in total; wanted tokens. "
            "Collect statistics for a few steps first."
        )
    return loads


def _replicas(loads: np.ndarray, num_replicas: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert of each replica [B, P], the first of each expert first, and counts [B, n].

    An expert has at most `most` of them, unless all have.
    """
    size, num_experts = loads.shape
    counts = np.ones(loads.shape, np.int32)
    made = np.empty((size, num_replicas), np.int64)
    made[:, :num_experts] = np.arange(num_experts)
    problem, share = np.arange(size), loads.copy()
    beyond = 2 * loads.max(-1) + 1
    if most == 1:
        share -= beyond[:, None]
    for i in range(num_experts, num_replicas):
        made[:, i] = busiest = np.argmax(share, axis=-1)
        counts[problem, busiest] += 1
        left = loads[problem, busiest] / counts[problem, busiest]
        # Below all others, and still in the order of the loads.
        full = counts[problem, busiest] >= most
        share[problem, busiest] = np.where(full, left - beyond, left)
    return made, counts


def _groups_to_nodes(
    loads: np.ndarray, num_groups: int, num_nodes: int, rate: np.ndarray
) -> np.ndarray:
    """Experts in the order of the nodes that they are packed onto, [B, E]."""
    size = loads.shape[-1] // num_groups
    weights = loads.reshape(len(loads), num_groups, size).sum(-1)
    shape = (len(loads), num_nodes)
    room = np.full(shape, num_groups // num_nodes)
    node, nth = pack(weights, room, np.broadcast_to(rate.reshape(num_nodes, -1).sum(-1), shape))
    order = np.argsort(node * (num_groups // num_nodes) + nth, axis=-1)
    return (order[..., None] * size + np.arange(size)).reshape(loads.shape)


def _rooms(
    num_devices: int, num_replicas: int | None, num_experts: int, slots: Sequence[int] | None
) -> np.ndarray:
    """Slots that each device may fill, [R]."""
    if num_devices < 1:
        raise ValueError(f"`place`: num_devices must be at least 1, got {num_devices}.")
    if slots is None:
        total = num_experts if num_replicas is None else num_replicas
        return np.full(num_devices, slots_per_device(total, num_devices, "place"))
    room = np.asarray(slots)
    if room.shape != (num_devices,) or room.min() < 0 or not np.issubdtype(room.dtype, np.integer):
        raise ValueError(
            f"`place`: slots are {room.dtype}{list(room.shape)}; wanted {num_devices} integers of "
            "at least 0, the experts that each device has memory for."
        )
    return room


def _check_counts(
    num_experts: int,
    num_replicas: int,
    num_devices: int,
    num_nodes: int,
    num_groups: int,
    room: np.ndarray,
) -> None:
    for name, count, parts, of in (
        ("num_devices", num_devices, num_nodes, "num_nodes"),
        ("experts", num_experts, num_groups, "num_groups"),
        ("num_replicas", num_replicas, num_nodes, "num_nodes"),
    ):
        if count % parts:
            raise ValueError(
                f"`place`: {name} ({count}) must be divisible by {of} ({parts}). Use "
                f"{-(-count // parts) * parts}, or num_nodes=1 and num_groups=1."
            )
    if num_replicas < num_experts:
        raise ValueError(
            f"`place`: {num_replicas} replicas are fewer than the {num_experts} experts. Every "
            "expert needs a slot: add slots or devices."
        )
    per_node = room.reshape(num_nodes, -1).sum(-1)
    if per_node.min() < num_replicas // num_nodes:
        where = "the devices have" if num_nodes == 1 else f"node {per_node.argmin()} has"
        raise ValueError(
            f"`place`: {num_replicas // num_nodes} replicas are more than the {per_node.min()} "
            f"slots that {where}. Lower num_replicas or raise slots."
        )


def check_speeds(name: str, speeds: Sequence[float] | None, num_devices: int) -> np.ndarray:
    """Speeds [R] as float64."""
    rate = np.ones(num_devices) if speeds is None else np.asarray(speeds, np.float64)
    if rate.shape != (num_devices,) or not np.all(np.isfinite(rate)) or rate.min() <= 0:
        raise ValueError(
            f"`{name}`: speeds are {rate.tolist()}; wanted {num_devices} positive numbers, one for "
            "each device."
        )
    return rate
