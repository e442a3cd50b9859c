"""`place_by_affinity`: exact counts, fewer rows on the wire, the load within its bound."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.balance import (
    bytes_saved,
    check_placement,
    contiguous,
    imbalance,
    place_by_affinity,
    wire_rows,
)
from jaxmoe.balance.loads import draw_choices

NUM_EXPERTS, NUM_DEVICES, TOP_K = 64, 8, 4


def draw(num_tokens: int = 200) -> np.ndarray:
    """Choices [R, T, K] of tokens that each have one of 8 topics."""
    return draw_choices(
        np.ones(NUM_EXPERTS),
        num_devices=NUM_DEVICES,
        num_tokens=num_tokens,
        top_k=TOP_K,
        num_topics=8,
        seed=0,
    )


def count_together(ids: np.ndarray) -> np.ndarray:
    together = np.zeros((NUM_EXPERTS, NUM_EXPERTS))
    for row in ids.reshape(-1, TOP_K):
        together[np.ix_(row, row)] += 1
    return together


def test_rows_on_the_wire_are_counted_once_per_destination():
    ids, got = draw(20), wire_rows(contiguous(NUM_EXPERTS), draw(20), num_devices=NUM_DEVICES)
    ids = ids.copy()
    ids[0, :5, 1:] = -1
    got = wire_rows(contiguous(NUM_EXPERTS), ids, num_devices=NUM_DEVICES)
    want = np.zeros((NUM_DEVICES, NUM_DEVICES), int)
    for device in range(NUM_DEVICES):
        for row in ids[device]:
            for target in {e // 8 for e in row.tolist() if e >= 0}:
                want[device, target] += 1
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_experts_of_a_topic_find_together(num_nodes: int):
    ids = draw()
    together = count_together(ids)
    found = place_by_affinity(together, num_devices=NUM_DEVICES, num_nodes=num_nodes)
    assert np.all(found.placement.counts == 1)
    # Eight topics of eight experts: twice the pairs on a device that a random placement has.
    assert found.together_on_device > 2 * found.before_on_device
    assert found.together_on_node >= found.before_on_node
    device = np.asarray(found.placement.expert_slots)[:, 0] // 8
    pairs = together - np.diag(np.diag(together))
    kept = sum(pairs[i, j] for i, j in np.argwhere(device[:, None] == device))
    assert found.together_on_device == pytest.approx(kept / pairs.sum())

    sent = wire_rows(found.placement, ids, num_devices=NUM_DEVICES)
    before = wire_rows(contiguous(NUM_EXPERTS), ids, num_devices=NUM_DEVICES)
    saved = (before.sum() - np.trace(before)) - (sent.sum() - np.trace(sent))
    assert saved > 0.1 * before.sum()
    assert saved * 100 == bytes_saved(found.placement, ids, num_devices=NUM_DEVICES, row_bytes=100)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    room=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    num_nodes=st.sampled_from([1, 2]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_counts_are_exact(seed: int, room: list[int], num_nodes: int, density: float):
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(1, max(sum(room), 1) + 1))
    if sum(room) < num_experts:
        return
    together = rng.integers(0, 50, (num_experts,) * 2) * (rng.random((num_experts,) * 2) < density)
    found = place_by_affinity(together, num_devices=4, num_nodes=num_nodes, slots=room)
    placement = found.placement
    check_placement(placement, num_experts=num_experts, num_slots=4 * max(room))
    held = np.sum(np.asarray(placement.slot_experts).reshape(4, -1) >= 0, -1)
    assert np.all(held <= room) and held.sum() == num_experts
    full = place_by_affinity(together, num_devices=1)
    assert full.together_on_device == 1.0
    again = place_by_affinity(together, num_devices=4, num_nodes=num_nodes, slots=room)
    np.testing.assert_array_equal(again.placement.slot_experts, placement.slot_experts)


def test_load_stays_within_the_bound():
    ids = draw()
    together, rng = count_together(ids), np.random.default_rng(0)
    load = rng.lognormal(0, 0.7, NUM_EXPERTS)
    options = dict(num_devices=NUM_DEVICES, num_nodes=2)
    free = place_by_affinity(together, **options)
    bound = place_by_affinity(together, **options, load=load, max_imbalance=1.1)
    assert imbalance(free.placement, load, NUM_DEVICES) > 1.2
    assert imbalance(bound.placement, load, NUM_DEVICES) <= 1.1
    assert free.together_on_device > bound.together_on_device > 1.5 * bound.before_on_device
    speeds = [1.0] * 6 + [2.0] * 2
    fast = place_by_affinity(together, **options, load=load, speeds=speeds, max_imbalance=1.3)
    assert imbalance(fast.placement, load, NUM_DEVICES, speeds) <= 1.3


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(together=np.ones((3, 4))), r"together has shape \[3, 4\]; wanted \[E, E\].*Give"),
        (dict(together=np.full((8, 8), np.nan)), "together holds NaN, infinite or negative"),
        (dict(together=-np.ones((8, 8))), "together holds NaN, infinite or negative"),
        (dict(num_devices=3), r"8 slots must be divisible by num_devices \(3\)"),
        (dict(num_nodes=3), r"num_devices \(4\) must be divisible by num_nodes \(3\)"),
        (dict(slots=[1, 2, 2, 2]), "8 experts are more than the 7 slots. Raise slots"),
        (dict(slots=[2, 2]), r"slots are int64\[2\]; wanted 4 integers"),
        (dict(load=np.zeros(8)), "load of layer 0 is zero in total"),
        (dict(speeds=[1, 1, 1]), "speeds are .*; wanted 4 positive numbers"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_bad_input(arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=rf"^`place_by_affinity`: {sentence}"):
        place_by_affinity(**{"together": np.ones((8, 8)), "num_devices": 4, **arguments})


def test_without_the_partitioner(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(ModuleNotFoundError, match=r"^`place_by_affinity`: the graph partitioner "
                       r"pymetis is not installed.*pip install 'jaxmoe\[balance\]'"):  # fmt: skip
        place_by_affinity(np.ones((8, 8)), num_devices=4)
