"""`place_by_affinity`: experts that are chosen together lie on the same device or node."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.balance.eplb import check_load, check_speeds
from jaxmoe.balance.placement import Placement, contiguous, placement_of, slots_per_device

# Edge weights of the partitioner are integers; larger ones would overflow its sums.
_LARGEST_WEIGHT = 10_000
_SEED = 1
_REPAIRS = 100


@dataclasses.dataclass(frozen=True)
class Affinity:
    """A placement and what it keeps together.

    Attributes:
      placement: of one layer, every expert in one slot.
      together_on_device, together_on_node: the part of all pairs of choices of a token that lie on
        one device, on one node.
      before_on_device, before_on_node: the same with expert e in slot e.
    """

    placement: Placement
    together_on_device: float
    together_on_node: float
    before_on_device: float
    before_on_node: float


def place_by_affinity(
    together: Any,
    *,
    num_devices: int,
    num_nodes: int = 1,
    load: Any = None,
    max_imbalance: float = 1.1,
    speeds: Sequence[float] | None = None,
    slots: Sequence[int] | None = None,
) -> Affinity:
    """Spread experts so that as many pairs as possible that tokens choose together share a device.

    A token sends one row per device, so that every pair on one device can save one. The
    co-occurrence counts are the edges of a graph that METIS (Karypis and Kumar 1998) cuts into
    nodes and then devices; afterwards experts are moved, those that lose least first, until every
    device has its exact number. With `load`, experts are then exchanged between devices until none
    has more than `max_imbalance` times its share, as far as exchanges can. Equal input gives equal
    placements.

    Args:
      together: [E, E] `Observation.together` of one layer, or an average of it; the diagonal is
        ignored.
      num_devices, num_nodes: R, and nodes of R / num_nodes consecutive devices.
      load: [E] tokens of each expert; None: only the numbers of experts count.
      max_imbalance: load of the busiest device by an even share, at most.
      speeds: [R] how fast each device is; its share of the load follows.
      slots: [R] experts that each device has memory for, E in all or more; None for E / R. The
        placement has max(slots) slots on every device.

    Raises:
      ModuleNotFoundError: without pymetis.
      ValueError: counts that are no [E, E] of finite numbers, or that do not divide; too few slots.
    """
    counts = _check_together(together)
    num_experts = len(counts)
    room = _check_rooms(num_experts, num_devices, num_nodes, slots)
    rate = check_speeds("place_by_affinity", speeds, num_devices)
    per_node = num_devices // num_nodes
    node_room = room.reshape(num_nodes, per_node)
    node = _partition(counts, _quotas(num_experts, node_room.sum(-1)))
    device = np.empty(num_experts, np.int64)
    for n in range(num_nodes):
        mine = np.flatnonzero(node == n)
        inside = _partition(counts[np.ix_(mine, mine)], _quotas(len(mine), node_room[n]))
        device[mine] = n * per_node + inside
    if load is not None:
        loads = check_load("place_by_affinity", load)
        _exchange(device, counts, loads, rate, max_imbalance, per_node)

    width = int(room.max())
    slot_experts = np.full((num_devices, width), -1)
    for d in range(num_devices):
        mine = np.flatnonzero(device == d)
        slot_experts[d, : len(mine)] = mine
    before = np.arange(num_experts) * num_devices // num_experts
    return Affinity(
        placement_of(slot_experts.reshape(-1), num_experts),
        _kept(counts, device),
        _kept(counts, device // per_node),
        _kept(counts, before),
        _kept(counts, before // per_node),
    )


def wire_rows(placement: Placement, expert_ids: Any, *, num_devices: int) -> np.ndarray:
    """Rows sent from device to device, [R, R], one per (token, destination), for known choices.

    For a placement without replicas. The diagonal stays at home.

    Args:
      placement: of one layer.
      expert_ids: [R, T, K] choices of each device's tokens; -1 is none.
      num_devices: R.
    """
    width = slots_per_device(placement.num_slots, num_devices, "wire_rows")
    ids = np.asarray(expert_ids)
    home = np.asarray(placement.expert_slots)[:, 0] // width
    device = np.where(ids >= 0, home[np.maximum(ids, 0)], -1)
    ordered = np.sort(device, axis=-1)
    first = np.diff(ordered, axis=-1, prepend=-1) != 0  # -1, no choice, sorts first
    source = np.broadcast_to(np.arange(num_devices)[:, None, None], ids.shape)
    rows = np.zeros((num_devices, num_devices), np.int64)
    np.add.at(rows, (source[first], ordered[first]), 1)
    return rows


def bytes_saved(
    placement: Placement,
    expert_ids: Any,
    *,
    num_devices: int,
    row_bytes: int,
    before: Placement | None = None,
) -> int:
    """Bytes that a dispatch of these choices sends less than with another placement.

    Args:
      placement, expert_ids, num_devices: as in `wire_rows`.
      row_bytes: bytes of a token on the wire.
      before: the placement to compare with; None for expert e in slot e.
    """
    before = contiguous(placement.num_experts) if before is None else before
    sent = [
        int(rows.sum() - np.trace(rows))
        for rows in (wire_rows(p, expert_ids, num_devices=num_devices) for p in (before, placement))
    ]
    return (sent[0] - sent[1]) * row_bytes


def _partition(counts: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """The part of each vertex, with exactly `quotas` vertices in each."""
    if len(quotas) == 1:
        return np.zeros(len(counts), np.int64)
    wanted = np.flatnonzero(quotas)
    if len(wanted) == 1:
        return np.full(len(counts), wanted[0])
    part = np.repeat(wanted, quotas[wanted])
    if counts.any():
        part = wanted[_metis(counts, quotas[wanted])]
    _repair(part, counts, quotas)
    return part


def _metis(counts: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    pymetis = _import_pymetis()
    scaled = np.ceil(counts * (_LARGEST_WEIGHT / counts.max())).astype(np.int64)
    rows, columns = np.nonzero(scaled)
    starts = np.searchsorted(rows, np.arange(len(counts) + 1))
    _, part = pymetis.part_graph(
        len(quotas),
        pymetis.CSRAdjacency(starts.tolist(), columns.tolist()),
        eweights=scaled[rows, columns].tolist(),
        tpwgts=(quotas / quotas.sum()).tolist(),
        recursive=len(quotas) <= 8,
        options=pymetis.Options(seed=_SEED),
    )
    return np.asarray(part, np.int64)


def _import_pymetis() -> Any:
    try:
        import pymetis
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`place_by_affinity`: the graph partitioner pymetis is not installed; wanted "
            "pymetis >= 2025.2. Install it with: pip install 'jaxmoe[balance]'"
        ) from error
    return pymetis


def _repair(part: np.ndarray, counts: np.ndarray, quotas: np.ndarray) -> None:
    """Moves vertices until every part has its quota, each time the move that loses the least."""
    sizes = np.bincount(part, minlength=len(quotas))
    pull = _pull(part, counts, len(quotas))
    while np.any(sizes > quotas):
        movable = np.flatnonzero(sizes[part] > quotas[part])
        free = np.flatnonzero(sizes < quotas)
        gain = pull[np.ix_(movable, free)] - pull[movable, part[movable]][:, None]
        i, j = np.unravel_index(np.argmax(gain), gain.shape)
        vertex, target = movable[i], free[j]
        sizes[part[vertex]] -= 1
        sizes[target] += 1
        pull[:, part[vertex]] -= counts[:, vertex]
        pull[:, target] += counts[:, vertex]
        part[vertex] = target


def _exchange(
    device: np.ndarray,
    counts: np.ndarray,
    loads: np.ndarray,
    rate: np.ndarray,
    max_imbalance: float,
    per_node: int,
) -> None:
    """Exchanges experts of the busiest device until it has no more than is allowed.

    Of the exchanges that help most devices of the same node come first: they keep tokens there.
    """
    share = loads.sum() * rate / rate.sum()
    for _ in range(_REPAIRS):
        busy = np.bincount(device, loads, len(rate)) / share
        hot = int(np.argmax(busy))
        if busy[hot] <= max_imbalance:
            return
        mine, others = np.flatnonzero(device == hot), np.flatnonzero(device != hot)
        shift = loads[mine][:, None] - loads[others]
        away = device[others]
        after = np.maximum(busy[hot] - shift / share[hot], busy[away] + shift / share[away])
        helps = after < busy[hot] * (1 - 1e-9)
        if not helps.any():
            return
        # Pairs that the exchange parts, of all pairs of the two experts, in place of a tie-break
        # by number: what costs little affinity comes first among what is good enough.
        pull = _pull(device, counts, len(rate))
        lost = pull[mine, hot][:, None] + pull[others, away] - pull[np.ix_(mine, away)]
        lost = lost - pull[others, hot] + 2 * counts[np.ix_(mine, others)]
        far = away // per_node != hot // per_node
        enough = np.maximum(after.min(), max_imbalance)
        cost = lost + np.where(far, counts.sum(), 0.0)
        cost = np.where(helps & (after <= enough), cost, np.inf)
        i, j = np.unravel_index(np.argmin(cost), cost.shape)
        device[mine[i]], device[others[j]] = device[others[j]], device[mine[i]]


def _pull(part: np.ndarray, counts: np.ndarray, num_parts: int) -> np.ndarray:
    """[E, parts] how often each expert is chosen together with those of each part."""
    member = np.zeros((len(part), num_parts))
    member[np.arange(len(part)), part] = 1
    pull: np.ndarray = counts @ member
    return pull


def _kept(counts: np.ndarray, part: np.ndarray) -> float:
    total = counts.sum()
    return float(counts[part[:, None] == part].sum() / total) if total else 1.0


def _quotas(num_experts: int, room: np.ndarray) -> np.ndarray:
    """Experts of each part: its room, or less where there is more room than experts."""
    exact = num_experts * room / max(room.sum(), 1)
    quotas = np.floor(exact).astype(np.int64)
    rest = np.argsort(quotas - exact, kind="stable")[: num_experts - quotas.sum()]
    quotas[rest] += 1
    return quotas


def _check_together(together: Any) -> np.ndarray:
    counts = np.array(together, np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(
            f"`place_by_affinity`: together has shape {list(counts.shape)}; wanted [E, E], the "
            "counts of one layer. Give `LoadStatistics.mean().together[layer]`."
        )
    if not np.all(np.isfinite(counts)) or counts.min() < 0:
        raise ValueError(
            "`place_by_affinity`: together holds NaN, infinite or negative numbers; wanted counts."
        )
    np.fill_diagonal(counts, 0)
    return (counts + counts.T) / 2


def _check_rooms(
    num_experts: int, num_devices: int, num_nodes: int, slots: Sequence[int] | None
) -> np.ndarray:
    if num_nodes < 1 or num_devices % num_nodes:
        raise ValueError(
            f"`place_by_affinity`: num_devices ({num_devices}) must be divisible by num_nodes "
            f"({num_nodes})."
        )
    if slots is None:
        width = slots_per_device(num_experts, num_devices, "place_by_affinity")
        return np.full(num_devices, width)
    room = np.asarray(slots)
    if room.shape != (num_devices,) or room.min() < 0 or not np.issubdtype(room.dtype, np.integer):
        raise ValueError(
            f"`place_by_affinity`: slots are {room.dtype}{list(room.shape)}; wanted {num_devices} "
            "integers of at least 0, the experts that each device has memory for."
        )
    if room.sum() < num_experts:
        raise ValueError(
            f"`place_by_affinity`: {num_experts} experts are more than the {room.sum()} slots. "
            "Raise slots or use more devices."
        )
    return room
