"""How fast an exchange can be on a machine: bounds from the actual routing, and GB/s.

A token's row must cross the link once to each *other* device that has one of its experts, however
many it has there, so the rows that cross are the distinct (token, destination device) pairs:
    sent[s, d] = #{t : some kept choice of token t of device s is for an expert of device d}.
The wire floor of one direction of travel is the largest row sum or column sum of `sent` without
its diagonal, times the bytes of a row, over the bandwidth of a device's link in one direction.
Dispatch and the gradient of combine carry rows that way, combine and the gradient of dispatch
carry one sum per pair back, which is the same number of bytes with the roles of sender and
receiver exchanged. (Counted like that in DeepEP's tests, which print the diagonal as well: that is
"logical" here.)

The memory floor counts what must be read or written at least once on the device with most of it;
copies that wait for a peer, and a second read of a row, may stay in a cache and are not counted:
    dispatch       reads T rows,                       writes C rows
    combine        reads num_rows rows,                writes T rows
    dispatch_grad  reads num_rows rows,                writes T rows
    combine_grad   reads T rows and num_rows rows,     writes C rows
C being written whole because rows without a choice are zero by contract. The two overlap, so the
floor of an operation is the larger one; of two operations in a row, the sum.

With an FP8 wire the rows that dispatch sends have fewer bytes, D codes and a float32 scale for each
block of 128; everything else stays.
"""

from __future__ import annotations

import dataclasses
import fractions

import numpy as np

OPERATIONS = ("dispatch", "combine", "dispatch_grad", "combine_grad", "pair")
_PARTS = {"pair": ("dispatch", "combine")}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a routing makes each device send and hold; rows, not bytes."""

    sent: np.ndarray
    """[R, R] int64: row s, column d as above, the diagonal included."""
    num_rows: np.ndarray
    """[R] rows in use of each device's expert buffer."""
    num_dropped: int
    num_tokens: int
    capacity: int

    @property
    def wire_rows(self) -> int:
        """Rows over the busiest direction of any device's link."""
        crossing = self.sent - np.diag(np.diag(self.sent))
        return int(max(crossing.sum(0).max(), crossing.sum(1).max()))

    @property
    def logical_rows(self) -> int:
        """The same with the rows that stay."""
        return int(max(self.sent.sum(0).max(), self.sent.sum(1).max()))


@dataclasses.dataclass(frozen=True)
class Machine:
    """Bandwidths in GB/s (1e9 bytes per second), and where the figures come from."""

    link_gbs: float
    hbm_gbs: float
    link_source: str = "given"
    hbm_source: str = "given"


@dataclasses.dataclass(frozen=True)
class Floor:
    """Least time of an operation in µs, and the bytes behind it."""

    wire_us: float
    hbm_us: float
    us: float
    wire_bytes: int
    logical_bytes: int
    hbm_bytes: int


def traffic(ids: np.ndarray, num_experts: int, capacity: int | None) -> Traffic:
    """Count a routing `ids` [R, T, K]; `capacity` rows per device, None for the worst case."""
    num_devices, num_tokens, top_k = ids.shape
    device = np.where(ids >= 0, ids // (num_experts // num_devices), -1)
    worst = num_devices * num_tokens * top_k
    capacity = worst if capacity is None else capacity
    sent = np.zeros((num_devices, num_devices), np.int64)
    num_rows = np.zeros(num_devices, np.int64)
    num_asked = 0
    for d in range(num_devices):
        mine = device == d
        num_asked += int(mine.sum())
        if mine.sum() > capacity:  # who is kept: see `jaxmoe.reference`
            by_priority = mine.transpose(2, 1, 0)
            place = np.cumsum(by_priority.reshape(-1)).reshape(by_priority.shape) - 1
            mine = mine & (place.transpose(2, 1, 0) < capacity)
        num_rows[d] = mine.sum()
        sent[:, d] = mine.any(axis=2).sum(axis=1)
    return Traffic(sent, num_rows, num_asked - int(num_rows.sum()), num_tokens, capacity)


def snug_factor(ids: np.ndarray, num_experts: int) -> float:
    """The least capacity factor, in steps of 1/20, with which nothing is dropped."""
    _, num_tokens, top_k = ids.shape
    most = int(traffic(ids, num_experts, None).num_rows.max())
    steps = -(-fractions.Fraction(most * 20, num_tokens * top_k) // 1)
    return max(int(steps), 1) / 20


def floor(
    operation: str, load: Traffic, row_bytes: int, machine: Machine, sent_bytes: int | None = None
) -> Floor:
    """The bounds at the head of this file; a row that dispatch sends has `sent_bytes`."""
    sent = {"dispatch": row_bytes if sent_bytes is None else sent_bytes}
    parts = [
        _floor(part, load, row_bytes, sent.get(part, row_bytes), machine)
        for part in _PARTS.get(operation, (operation,))
    ]
    return Floor(*(sum(values) for values in zip(*map(dataclasses.astuple, parts), strict=True)))


def _floor(
    operation: str, load: Traffic, row_bytes: int, sent_bytes: int, machine: Machine
) -> Floor:
    tokens, used, capacity = load.num_tokens, int(load.num_rows.max()), load.capacity
    rows = {
        "dispatch": tokens + capacity,
        "combine": used + tokens,
        "dispatch_grad": used + tokens,
        "combine_grad": tokens + used + capacity,
    }[operation]
    wire_bytes, hbm_bytes = load.wire_rows * sent_bytes, rows * row_bytes
    wire_us = wire_bytes / machine.link_gbs / 1e3
    hbm_us = hbm_bytes / machine.hbm_gbs / 1e3
    logical_bytes = load.logical_rows * sent_bytes
    return Floor(wire_us, hbm_us, max(wire_us, hbm_us), wire_bytes, logical_bytes, hbm_bytes)
