"""When to move experts while a job runs, and which: few moves, and only those that pay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.balance.eplb import check_load, check_speeds, device_loads
from jaxmoe.balance.migration import count_moves
from jaxmoe.balance.placement import Placement, placement_of, slots_per_device

# The power that stands in for a maximum: with it two equally busy devices can be relieved one after
# the other.
_POWER = 8
# Devices, by falling load, for which a change is looked for.
_CANDIDATES = 8


@dataclasses.dataclass(frozen=True)
class MoveRule:
    """When a migration pays. Times are in units of the expert computation of a balanced step.

    A migration from the loads m to m' of the busiest device (1 is balanced) saves m - m' in each
    step. It is made when m' <= (1 - min_gain) m, so that noise does not move experts to and fro,
    and when (m - m') * horizon > moves * move_cost.

    Attributes:
      max_moves: most slots that change in one migration.
      min_gain: hysteresis, the part of the busiest device's load that must fall away.
      horizon: steps for which the load is believed to last: those until the next look.
      move_cost: of one slot: `expert_bytes / bytes_per_second / seconds_of_a_balanced_step`, with
        the bytes of an expert's weights and optimiser state in all layers that move.

    Raises:
      ValueError: for a value out of its range.
    """

    max_moves: int = 8
    min_gain: float = 0.05
    horizon: int = 100
    move_cost: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("max_moves", 1), ("horizon", 1), ("min_gain", 0), ("move_cost", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(
                    f"`MoveRule`: {name} ({value}) must be finite and at least {least}."
                )

    def pays(self, before: float, after: float, moves: int) -> bool:
        """Whether to make so many moves for this change of the busiest device's load."""
        worth = (before - after) * self.horizon > moves * self.move_cost
        return moves > 0 and worth and after <= (1 - self.min_gain) * before


def rebalance(
    load: Any,
    placement: Placement,
    *,
    num_devices: int,
    rule: MoveRule | None = None,
    speeds: Sequence[float] | None = None,
) -> Placement:
    """The placement to go on with: an improved one where that pays, else the one given.

    Args:
      load: [E] tokens of each expert, a decayed average.
      placement: of one layer.
      num_devices: R.
      rule: None for the default one.
      speeds: [R], as in `place`.
    """
    rule = rule or MoveRule()
    new = improve(load, placement, num_devices=num_devices, max_moves=rule.max_moves, speeds=speeds)
    before, after = (imbalance(p, load, num_devices, speeds) for p in (placement, new))
    return new if rule.pays(before, after, count_moves(placement, new)) else placement


def imbalance(
    placement: Placement, load: Any, num_devices: int, speeds: Sequence[float] | None = None
) -> float:
    """Load of the busiest device by that of an even spread, over the devices' speeds; at least 1.

    With layers, that of the worst of them.
    """
    rate = check_speeds("imbalance", speeds, num_devices)
    loads = device_loads(placement, load, num_devices)
    return float(np.max(np.max(loads / rate, -1) / (loads.sum(-1) / rate.sum())))


def improve(
    load: Any,
    placement: Placement,
    *,
    num_devices: int,
    max_moves: int,
    speeds: Sequence[float] | None = None,
) -> Placement:
    """Relieve the busiest device, again and again, by changing at most `max_moves` slots.

    Each change either exchanges one of its experts with another device, or gives one of them a
    further replica in place of a replica that its expert can do without, whichever lowers
    `sum over devices of time^8` most per move. No change gives a device a second replica of an
    expert, which would serve no more tokens than one (`choose_replicas`).

    (After the incremental balancers of serving systems: a small number of swaps keeps most of what
    a new placement would gain.)

    Args:
      load: [E].
      placement: of one layer.
      num_devices: R.
      max_moves: most slots that differ from `placement` in the end.
      speeds: [R], as in `place`.
    """
    loads = check_load("improve", load)
    rate = check_speeds("improve", speeds, num_devices)
    search = _Search(loads, placement, num_devices, rate)
    while True:
        change = search.best()
        if not change:
            break
        held = search.held.copy()
        held[list(change)] = list(change.values())
        if int(np.sum((held != search.first) & (held >= 0))) > max_moves:
            break
        search.set(held)
    return placement_of(search.held, len(loads), max_replicas=placement.max_replicas)


def align(new: Placement, old: Placement, *, num_devices: int, num_nodes: int = 1) -> Placement:
    """`new` with its nodes, devices and slots renumbered so that few experts move from `old`.

    Devices of equal speed are interchangeable, and so are the slots of a device: which of them a
    placement names is of no matter to the load. Nodes keep their devices together.

    Args:
      new, old: placements of one layer and equal sizes.
      num_devices: R.
      num_nodes: nodes of R / num_nodes consecutive devices.

    Returns:
      A placement with the loads of `new`, and no more moves from `old`.
    """
    from scipy.optimize import linear_sum_assignment

    width = slots_per_device(new.num_slots, num_devices, "align")
    before = np.asarray(old.slot_experts).reshape(num_devices, width)
    after = np.asarray(new.slot_experts).reshape(num_devices, width)
    same = _shared(before, after, new.num_experts)
    per_node = num_devices // num_nodes
    blocks = same.reshape(num_nodes, per_node, num_nodes, per_node).swapaxes(1, 2)
    pairs = [[linear_sum_assignment(-b) for b in row] for row in blocks]
    kept = np.array([[blocks[i, j][p].sum() for j, p in enumerate(r)] for i, r in enumerate(pairs)])
    result = np.empty_like(after)
    for i, j in zip(*linear_sum_assignment(-kept), strict=True):
        for a, b in zip(*pairs[i][j], strict=True):
            device = i * per_node + a
            result[device] = _keep_slots(before[device], after[j * per_node + b])
    best = placement_of(result.reshape(-1), new.num_experts, max_replicas=new.max_replicas)
    return best if count_moves(old, best) <= count_moves(old, new) else new


class _Search:
    """The slots of one layer, and what each possible change would do to the devices' loads."""

    def __init__(
        self, loads: np.ndarray, placement: Placement, num_devices: int, rate: np.ndarray
    ) -> None:
        self.first = np.array(placement.slot_experts)
        self.home = np.arange(len(self.first)) // slots_per_device(
            len(self.first), num_devices, "improve"
        )
        self._loads, self._num_devices = loads, num_devices
        self._unit = loads.sum() / rate.sum()
        self._rate = rate
        self.set(self.first.copy())

    def set(self, held: np.ndarray) -> None:
        self.held = held
        self._filled = held >= 0
        self._counts = np.bincount(held[self._filled], minlength=len(self._loads))
        share = self._loads / self._counts
        self._share = np.where(self._filled, share[held], 0.0)
        self._busy = np.bincount(self.home, self._share, self._num_devices)
        # [E, R] replicas of each expert on each device.
        self._where = np.zeros((len(self._loads), self._num_devices))
        np.add.at(self._where, (held[self._filled], self.home[self._filled]), 1)

    def best(self) -> dict[int, int]:
        """The change of slots that relieves a busy device most per move; {} where none does.

        The busiest device comes first, the next ones where nothing can be done for it.
        """
        least = 1e-9 * self._cost(self._busy).sum()
        for hot in np.argsort(-self._busy / self._rate, kind="stable")[:_CANDIDATES]:
            found = (self._best_exchange(int(hot)), self._best_replica(int(hot)))
            gain, change = max((f for f in found if f), key=lambda f: f[0], default=(0.0, {}))
            if gain > least:
                return change
        return {}

    def _cost(self, busy: np.ndarray, device: Any = slice(None)) -> np.ndarray:
        cost: np.ndarray = np.abs(busy / self._rate[device] / self._unit) ** _POWER
        return cost

    def _best_exchange(self, hot: int) -> tuple[float, dict[int, int]] | None:
        mine, others = np.flatnonzero(self.home == hot), np.flatnonzero(self.home != hot)
        mine = mine[self._filled[mine]]
        if not len(mine) or not len(others):
            return None
        shift = self._share[mine][:, None] - self._share[others]
        away = self.home[others]
        cost = self._cost(self._busy)
        gain = cost[hot] + cost[away] - self._cost(self._busy[hot] - shift, hot)
        gain -= self._cost(self._busy[away] + shift, away)
        gain /= np.where(self._filled[others], 2, 1)
        theirs = np.where(self._filled[others], self._where[self.held[others], hot], 0)
        gain[(self._where[self.held[mine]][:, away] > 0) | (theirs > 0)] = -math.inf
        i, j = np.unravel_index(np.argmax(gain), gain.shape)
        a, b = int(mine[i]), int(others[j])
        return float(gain[i, j]), {a: int(self.held[b]), b: int(self.held[a])}

    def _best_replica(self, hot: int) -> tuple[float, dict[int, int]] | None:
        """A further replica of an expert of the device, in a slot that can be spared."""
        experts = np.unique(self.held[(self.home == hot) & self._filled])
        spared = ~self._filled | (self._counts[self.held] > 1)
        slots = np.flatnonzero(spared & (self.home != hot))
        if not len(experts) or not len(slots):
            return None
        where, counts, loads = self._where, self._counts, self._loads
        added = loads[experts] / (counts[experts] + 1)
        less = where[experts] * (added - loads[experts] / counts[experts])[:, None]
        gone = self.held[slots]
        after = np.where(gone >= 0, loads[gone] / np.maximum(counts[gone] - 1, 1), 0.0)
        now = np.where(gone >= 0, loads[gone] / counts[gone], 0.0)
        more = np.where(gone[:, None] >= 0, where[gone], 0.0) * (after - now)[:, None]
        busy = self._busy + less[:, None] + more
        index = np.arange(len(slots))
        busy[:, index, self.home[slots]] += added[:, None] - after
        gain = self._cost(self._busy).sum() - self._cost(busy).sum(-1)
        gain[(experts[:, None] == gone) | (where[experts][:, self.home[slots]] > 0)] = -math.inf
        i, j = np.unravel_index(np.argmax(gain), gain.shape)
        return float(gain[i, j]), {int(slots[j]): int(experts[i])}


def _shared(before: np.ndarray, after: np.ndarray, num_experts: int) -> np.ndarray:
    """[R, R] slots that keep their expert if device i takes over the experts of `after`'s j."""
    held = []
    for slots in (before, after):
        count = np.zeros((len(slots), num_experts + 1), np.int64)
        np.add.at(count, (np.arange(len(slots))[:, None], slots), 1)
        held.append(count[:, :-1])
    return np.array([np.minimum(row, held[1]).sum(-1) for row in held[0]])


def _keep_slots(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The experts `after` in such an order that those of `before` stay in their slots."""
    left = after.tolist()
    result = np.full_like(before, -2)
    for slot, expert in enumerate(before):
        if expert in left:
            result[slot] = expert
            left.remove(expert)
    result[result == -2] = left
    return result
