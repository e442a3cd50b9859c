"""`replicate` and `place`: the published result, optimal counts, room, speed and bad input."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placements import placements, random_placement, slots_of, zipf

from jaxmoe.balance import (
    Placement,
    check_placement,
    contiguous,
    device_loads,
    imbalance,
    place,
    placement_of,
    replicate,
)

# The example in the README of deepseek-ai/EPLB: loads, and the expert in each slot.
GOLDEN_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
GOLDEN_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
loads = st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any)


def check_consistent(placement: Placement) -> None:
    """The three arrays say the same."""
    for expert in range(placement.num_experts):
        slots = slots_of(placement, expert)
        padding = [-1] * (placement.max_replicas - len(slots))
        assert placement.expert_slots[expert].tolist() == slots + padding
        assert placement.counts[expert] == len(slots) >= 1


def test_hierarchical_placement_is_the_published_one():
    placement = place(GOLDEN_LOAD, num_devices=8, num_replicas=16, num_nodes=2, num_groups=4)
    np.testing.assert_array_equal(placement.slot_experts, GOLDEN_SLOTS)
    for layer in range(2):
        check_consistent(placement[layer])


@given(placement=placements())
def test_arrays_of_a_placement_agree(placement: Placement):
    check_consistent(placement)
    check_placement(placement, num_experts=placement.num_experts, num_slots=placement.num_slots)


def test_all_placements_of_a_size_have_one_shape():
    rng = np.random.default_rng(0)
    shapes = {tuple(a.shape for a in vars(random_placement(rng, 6, 16)).values()) for _ in range(9)}
    assert shapes == {((16,), (6, 11), (6,))}


@settings(max_examples=40)
@given(load=st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any), more=st.integers(0, 3))
def test_counts_make_the_busiest_replica_as_idle_as_can_be(load: list[int], more: int):
    total = len(load) + more
    counts = replicate(load, total)
    assert counts.sum() == total and counts.min() >= 1
    every = itertools.product(range(1, more + 2), repeat=len(load))
    best = min(max(np.divide(load, c)) for c in every if sum(c) == total)
    assert max(np.divide(load, counts)) == best


@given(load=loads, num_devices=st.integers(1, 5), more=st.integers(0, 9))
def test_every_device_gets_equally_many(load: list[int], num_devices: int, more: int):
    num_slots = -(-(len(load) + more) // num_devices) * num_devices
    placement = place(load, num_devices=num_devices, num_replicas=num_slots)
    check_consistent(placement)
    np.testing.assert_array_equal(placement.counts, replicate(load, num_slots))
    assert np.all(placement.slot_experts >= 0)
    np.testing.assert_allclose(device_loads(placement, load, num_devices).sum(), sum(load))


@given(seed=st.integers(0, 2**32 - 1), num_nodes=st.sampled_from([2, 4]))
def test_groups_and_their_replicas_stay_on_a_node(seed: int, num_nodes: int):
    load = np.random.default_rng(seed).random((3, 16)) ** 3
    placement = place(load, num_devices=8, num_replicas=32, num_nodes=num_nodes, num_groups=8)
    for layer in range(3):
        node = [
            {slot // (32 // num_nodes) for e in group for slot in slots_of(placement[layer], e)}
            for group in np.arange(16).reshape(8, 2).tolist()
        ]
        assert all(len(nodes) == 1 for nodes in node)
        assert [sum({n} == nodes for nodes in node) for n in range(num_nodes)] == (
            [8 // num_nodes] * num_nodes
        )


@given(load=loads, room=st.lists(st.integers(0, 6), min_size=2, max_size=5), free=st.integers(0, 3))
def test_no_device_gets_more_than_it_has_room_for(load: list[int], room: list[int], free: int):
    if sum(room) - free < len(load):
        return
    placement = place(load, num_devices=len(room), num_replicas=sum(room) - free, slots=room)
    check_consistent(placement)
    held = placement.slot_experts.reshape(len(room), max(room)) >= 0
    assert np.all(held.sum(-1) <= room)
    assert held.sum() == sum(room) - free


@given(load=loads, num_devices=st.integers(1, 5), width=st.integers(1, 4))
def test_replicas_of_an_expert_lie_on_distinct_devices(
    load: list[int], num_devices: int, width: int
):
    """Whatever the room allows: a device holds two of an expert only if every device is full of
    experts that it holds once, which packing can run into at its end.
    """
    num_slots = num_devices * width
    if num_slots < len(load):
        return
    placement = place(load, num_devices=num_devices, num_replicas=num_slots, distinct=True)
    check_consistent(placement)
    if num_slots <= len(load) * num_devices:
        assert placement.counts.max() <= num_devices
    held = placement.slot_experts.reshape(num_devices, width)
    repeated = sum(width - len(set(row)) for row in held.tolist())
    plain = place(load, num_devices=num_devices, num_replicas=num_slots)
    before = plain.slot_experts.reshape(num_devices, width)
    assert repeated <= sum(width - len(set(row)) for row in before.tolist())


def test_distinct_devices_keep_what_the_load_promises():
    """Tokens take the replica on their own device: two of an expert there would get one's load."""
    load = np.arange(1, 65) ** -1.5
    devices, slots = 2, 80
    same = place(load, num_devices=devices, num_replicas=slots)
    apart = place(load, num_devices=devices, num_replicas=slots, distinct=True)
    got = {}
    for name, placement in (("same", same), ("apart", apart)):
        where = placement.slot_experts.reshape(devices, -1)
        here = np.array([np.isin(np.arange(64), row) for row in where])
        # An expert's load comes from all devices alike, and stays where there is a replica.
        served = here * load / here.sum(0)
        got[name] = served.sum(-1).max() / served.sum(-1).mean()
    assert got["same"] > 1.05 and got["apart"] < 1.01
    golden = place(
        GOLDEN_LOAD, num_devices=8, num_replicas=16, num_nodes=2, num_groups=4, distinct=True
    )
    np.testing.assert_array_equal(golden.slot_experts, GOLDEN_SLOTS)


def test_a_faster_device_gets_more():
    speeds = [1.0, 1.0, 2.0, 4.0]
    load = np.random.default_rng(0).random(64)
    placement = place(load, num_devices=4, speeds=speeds, slots=[40] * 4, num_replicas=80)
    assert imbalance(placement, load, 4, speeds) < 1.01
    blind = place(load, num_devices=4, num_replicas=80)
    assert imbalance(blind, load, 4, speeds) > 1.9


@pytest.mark.parametrize("seed", range(5))
def test_skewed_load_is_balanced(seed: int):
    """The bound of the issue: Zipf 1.2, 256 experts, 32 devices, 32 redundant slots."""
    load = np.random.default_rng(seed).permutation(zipf(256))
    assert imbalance(contiguous(256), load, 32) > 2
    assert imbalance(place(load, num_devices=32, num_replicas=288), load, 32) <= 1.05


def test_a_large_model_is_placed_at_once():
    load = np.random.default_rng(0).permuted(np.tile(zipf(256), (61, 1)), axis=-1)
    for distinct in (False, True):
        start = time.process_time()
        placement = place(load, num_devices=144, num_replicas=288, distinct=distinct)
        assert time.process_time() - start <= 0.3
        assert placement.slot_experts.shape == (61, 288)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(load=[1, np.nan]), "load holds nan; wanted finite numbers of at least 0. Leave out"),
        (dict(load=[1, np.inf]), "load holds inf"),
        (dict(load=[1, -2]), "load holds -2.0"),
        (dict(load=[[1, 1], [0, 0]]), "load of layer 1 is zero in total.*Collect statistics"),
        (dict(load=3.0), r"load has shape \[\]; wanted \[..., E\]"),
        (dict(num_devices=0), "num_devices must be at least 1, got 0"),
        (dict(num_replicas=9), r"9 slots must be divisible by num_devices \(4\). Use 12"),
        (dict(num_replicas=4), "4 replicas are fewer than the 8 experts.*add slots or devices"),
        (dict(num_nodes=3, num_groups=3), r"num_devices \(4\) must be divisible by num_nodes"),
        (dict(num_nodes=2, num_groups=6), r"experts \(8\) must be divisible by num_groups"),
        (dict(slots=[2, 2, 2, 2], num_replicas=9), "9 replicas are more than the 8 slots that the "
         "devices have. Lower num_replicas or raise slots"),
        (dict(slots=[1, 3, 4, 4], num_replicas=12, num_nodes=2, num_groups=2),
         "6 replicas are more than the 4 slots that node 0 has"),
        (dict(slots=[2, 2, 4]), r"slots are int64\[3\]; wanted 4 integers"),
        (dict(slots=[2.5] * 4), r"slots are float64\[4\]; wanted 4 integers"),
        (dict(speeds=[1, 1, 1, 0]), "speeds are .*; wanted 4 positive numbers"),
        (dict(max_replicas=1, num_replicas=16), "expert 0 of layer 0 has 2 replicas, max_replicas "
         "is 1. Raise it"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_bad_input_of_place(arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=rf"^`place(ment_of)?`: .*{sentence}"):
        place(**{"load": np.ones(8), "num_devices": 4, **arguments})


def test_bad_input_of_replicate():
    with pytest.raises(
        ValueError, match=r"^`replicate`: num_replicas \(2\) must be at least the 3"
    ):
        replicate([1, 2, 3], 2)
    with pytest.raises(ValueError, match=r"^`replicate`: load holds nan"):
        replicate([1, np.nan], 2)


@pytest.mark.parametrize(
    "slots, sentence",
    [
        ([0, 1, 3], r"slot_experts hold 3; wanted -1 or an expert below num_experts \(3\)"),
        ([0, 1, -2], "slot_experts hold -2"),
        ([0, 1, 1], "expert 2 of layer 0 has no slot. Every expert needs one"),
        ([0.0, 1.0, 2.0], r"slot_experts are float64\[3\]; wanted integers"),
    ],
)
def test_bad_slots(slots: list[Any], sentence: str):
    with pytest.raises(ValueError, match=rf"^`placement_of`: {sentence}"):
        placement_of(slots, 3)


def test_placement_of_another_model_or_mesh():
    placement = contiguous(6, 8)
    with pytest.raises(ValueError, match=r"^`placement`: it places 6 experts, the model has 7.*of "
                       "another model"):  # fmt: skip
        check_placement(placement, num_experts=7, num_slots=8)
    with pytest.raises(ValueError, match=r"^`placement`: it fills 8 slots, the group has 6. If "
                       "devices left or joined the mesh, make a placement"):  # fmt: skip
        check_placement(placement, num_experts=6, num_slots=6)
    with pytest.raises(TypeError, match=r"^`placement`: got list, wanted a jaxmoe.balance.Placem"):
        check_placement([0, 1], num_experts=2, num_slots=2)  # type: ignore[arg-type]
    torn = Placement(placement.slot_experts[::-1], placement.expert_slots, placement.counts)
    with pytest.raises(ValueError, match=r"^`placement`: expert_slots contradict slot_experts"):
        check_placement(torn, num_experts=6, num_slots=8)
    with pytest.raises(
        ValueError, match=r"^`contiguous`: num_slots \(3\) must be at least num_exp"
    ):
        contiguous(4, 3)
    with pytest.raises(IndexError, match="placement of one layer; it has no others"):
        placement[0]
    with pytest.raises(
        ValueError, match=r"^`device_loads`: 8 slots must be divisible by num_devic"
    ):
        device_loads(placement, np.ones(6), 3)
