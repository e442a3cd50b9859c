"""Loads of `python -m jaxmoe bench`: who sends how much, and how long that takes at least."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from jaxmoe.bench import floors, loads
from jaxmoe.bench.floors import Machine

LIMITS = Machine(link_gbs=100.0, hbm_gbs=1000.0)


# Loads


@pytest.mark.parametrize("name", ["uniform", "zipf:1.2", "zipf:3", "hot"])
def test_experts_of_a_token_are_distinct_and_the_same_each_time(name: str):
    ids = loads.expert_ids(loads.parse(name), 4, 50, 8, 16)
    assert ids.shape == (4, 50, 8) and ids.dtype == np.int32
    assert ids.min() >= 0 and ids.max() < 16
    assert all(len(set(token)) == 8 for token in ids.reshape(-1, 8).tolist())
    np.testing.assert_array_equal(ids, loads.expert_ids(loads.parse(name), 4, 50, 8, 16))


@pytest.mark.parametrize("name", ["uniform", "zipf:1.2"])
def test_first_choices_follow_the_distribution(name: str):
    load, num = loads.parse(name), 40_000
    first = loads.expert_ids(load, 1, num, 2, 32)[0, :, 0]
    p = load.probabilities(32) / load.probabilities(32).sum()
    # Six standard deviations of a binomial count.
    slack = 6 * np.sqrt(num * p * (1 - p))
    np.testing.assert_array_less(np.abs(np.bincount(first, minlength=32) - num * p), slack)


def test_zipf_names_a_ratio():
    p = np.sort(loads.parse("zipf:2").probabilities(8))[::-1]
    np.testing.assert_allclose(p[0] / p, np.arange(1, 9) ** 2.0)


def test_hot_sends_every_token_to_one_expert_and_the_rest_anywhere():
    ids = loads.expert_ids(loads.parse("hot"), 2, 4000, 3, 8)
    assert (ids[..., 0] == 0).all() and (ids[..., 1:] > 0).all()
    counts = np.bincount(ids[..., 1:].ravel(), minlength=8)[1:]
    assert counts.min() > 0.9 * counts.max()


def test_weights_of_a_token_sum_to_one():
    weights = loads.choice_weights(2, 30, 4)
    assert weights.min() > 0
    np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-6)


# Floors


def count_by_hand(ids: np.ndarray, num_experts: int, capacity: int) -> dict[str, Any]:
    """`floors.traffic`, one choice at a time in the order in which they get rooms."""
    R, T, K = ids.shape
    rows, pairs, dropped = [0] * R, set(), 0
    for k, t, s in itertools.product(range(K), range(T), range(R)):
        if ids[s, t, k] < 0:
            continue
        device = int(ids[s, t, k]) // (num_experts // R)
        if rows[device] == capacity:
            dropped += 1
            continue
        rows[device] += 1
        pairs.add((s, t, device))
    sent = np.zeros((R, R), int)
    for s, _, device in pairs:
        sent[s, device] += 1
    crossing = {(s, t, d) for s, t, d in pairs if s != d}
    out = [sum(s == device for s, _, _ in crossing) for device in range(R)]
    into = [sum(d == device for _, _, d in crossing) for device in range(R)]
    return {"rows": rows, "dropped": dropped, "sent": sent, "wire": max(out + into)}


@pytest.mark.parametrize("name", ["uniform", "zipf:1.2", "hot"])
@pytest.mark.parametrize("capacity", [15, 40, None])
def test_traffic_is_a_count(name: str, capacity: int | None):
    ids = loads.expert_ids(loads.parse(name), 4, 20, 3, 8)
    ids[1, ::3, 1] = -1
    got = floors.traffic(ids, 8, capacity)
    want = count_by_hand(ids, 8, 4 * 20 * 3 if capacity is None else capacity)
    np.testing.assert_array_equal(got.sent, want["sent"])
    assert got.num_rows.tolist() == want["rows"]
    assert (got.num_dropped, got.wire_rows) == (want["dropped"], want["wire"])


def test_floors_when_every_token_goes_everywhere():
    T, R, row = 10, 4, 1000
    ids = np.broadcast_to(np.arange(R, dtype=np.int32), (R, T, R))  # one expert on each device
    load = floors.traffic(ids, R, 50)
    got = {name: floors.floor(name, load, row, LIMITS) for name in floors.OPERATIONS}
    wire = (R - 1) * T * row / 100e3
    assert {f.wire_us for name, f in got.items() if name != "pair"} == {wire}
    assert got["pair"].wire_bytes == 2 * (R - 1) * T * row
    assert got["dispatch"].logical_bytes == R * T * row
    used, capacity = R * T, 50
    memory = {
        "dispatch": T + capacity,
        "combine": used + T,
        "dispatch_grad": used + T,
        "combine_grad": T + used + capacity,
    }
    assert {name: got[name].hbm_bytes for name in memory} == {
        name: rows * row for name, rows in memory.items()
    }
    slow = floors.floor("dispatch", load, row, Machine(1000.0, 1.0))
    assert slow.us == slow.hbm_us > slow.wire_us
    assert got["pair"].us == got["dispatch"].us + got["combine"].us


def test_an_fp8_wire_lowers_the_wire_floor_of_dispatch_alone():
    ids = np.broadcast_to(np.arange(4, dtype=np.int32), (4, 10, 4))
    load = floors.traffic(ids, 4, 50)
    plain, fp8 = (
        {name: floors.floor(name, load, 400, LIMITS, sent) for name in floors.OPERATIONS}
        for sent in (None, 204)
    )
    for name in ("combine", "dispatch_grad", "combine_grad"):
        assert fp8[name] == plain[name]
    assert fp8["dispatch"].wire_bytes == 3 * 10 * 204
    assert fp8["dispatch"].logical_bytes == 4 * 10 * 204
    assert fp8["dispatch"].hbm_bytes == plain["dispatch"].hbm_bytes
    assert fp8["pair"].wire_bytes == 3 * 10 * (204 + 400)


def test_floor_of_the_largest_shape():
    """58.6 MB and 158 µs each way at 371 GB/s, for uniform routing over two devices."""
    ids = loads.expert_ids(loads.parse("uniform"), 2, 4096, 8, 256)
    floor = floors.floor("dispatch", floors.traffic(ids, 256, 34_000), 7168 * 2, Machine(371, 3900))
    assert floor.wire_bytes == pytest.approx(58.5e6, rel=0.01)
    assert floor.wire_us == pytest.approx(158, rel=0.01)


@pytest.mark.parametrize("name", ["uniform", "hot"])
def test_snug_factor_is_the_least_that_drops_nothing(name: str):
    ids = loads.expert_ids(loads.parse(name), 4, 100, 2, 8)
    factor = floors.snug_factor(ids, 8)
    assert floors.traffic(ids, 8, round(factor * 200)).num_dropped == 0
    assert floors.traffic(ids, 8, round((factor - 0.05) * 200)).num_dropped > 0
