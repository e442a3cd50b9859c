"""`choose_replicas`: choices reach a nearest replica of their expert, and they share evenly."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from placements import random_placement, slots_of

from jaxmoe import balance
from jaxmoe.balance import Placement, choose_replicas, contiguous, locality_of, near_replicas
from jaxmoe.balance import choice as choice_module

NUM_DEVICES, NUM_TOKENS, TOP_K = 8, 12, 3


@functools.partial(jax.jit, static_argnames=("per_node", "exact", "devices"))
def slots_chosen(
    placement: Placement, ids: Any, *, per_node: int | None, exact: bool, devices: int
) -> Any:
    """[R, T, K] slots for ids [R, T, K]."""

    def on_device(device: Any, ids: Any) -> Any:
        near = near_replicas(placement, device, num_devices=devices, devices_per_node=per_node)
        return choose_replicas(near, ids, exact=exact)

    return jax.vmap(on_device)(jax.numpy.arange(devices, dtype=jax.numpy.int32), ids)


def nearest(placement: Placement, expert: int, device: int, per_node: int) -> list[int]:
    """The slots that a device may send to."""
    width = placement.num_slots // NUM_DEVICES
    slots = slots_of(placement, expert)
    here = [s for s in slots if s // width == device]
    on_node = [s for s in slots if s // width // per_node == device // per_node]
    return here or on_node or slots


nodes = st.sampled_from([None, 2, 4])
# Each shape is a program of its own.
few_shapes = st.sampled_from([(3, 8, 0), (3, 8, 2), (6, 16, 0), (6, 16, 5)]).flatmap(
    lambda sizes: st.builds(
        lambda seed: random_placement(np.random.default_rng(seed), *sizes),
        st.integers(0, 2**32 - 1),
    )
)


@settings(max_examples=40, deadline=None)
@given(placement=few_shapes, per_node=nodes, exact=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_every_choice_reaches_a_nearest_replica(
    placement: Placement, per_node: int | None, exact: bool, seed: int
):
    rng = np.random.default_rng(seed)
    experts = placement.num_experts
    ids = rng.integers(-2, experts + 2, (NUM_DEVICES, NUM_TOKENS, TOP_K)).astype(np.int32)
    chosen = slots_chosen(placement, ids, per_node=per_node, exact=exact, devices=NUM_DEVICES)
    for device, token, k in np.ndindex(ids.shape):
        expert, slot = ids[device, token, k], int(chosen[device, token, k])
        if not 0 <= expert < experts:
            assert slot == (-1 if expert == -1 else -2)
        else:
            assert slot in nearest(placement, expert, device, per_node or 1)


@settings(max_examples=40, deadline=None)
@given(placement=few_shapes, per_node=nodes, seed=st.integers(0, 2**32 - 1))
def test_exact_choices_are_even_on_every_device(
    placement: Placement, per_node: int | None, seed: int
):
    rng = np.random.default_rng(seed)
    shape = (NUM_DEVICES, NUM_TOKENS, TOP_K)
    ids = rng.integers(0, placement.num_experts, shape).astype(np.int32)
    chosen = slots_chosen(placement, ids, per_node=per_node, exact=True, devices=NUM_DEVICES)
    for device in range(NUM_DEVICES):
        used = Counter(np.asarray(chosen[device]).ravel().tolist())
        for expert in range(placement.num_experts):
            counts = [used[s] for s in nearest(placement, expert, device, per_node or 1)]
            assert max(counts) - min(counts) <= 1


@settings(max_examples=40, deadline=None)
@given(placement=few_shapes, per_node=nodes, data=st.data())
def test_devices_take_turns(placement: Placement, per_node: int | None, data: Any):
    """One token per device, all for one expert: the devices of a node share its replicas evenly,
    and those of all nodes without any share what there is.
    """
    expert = data.draw(st.integers(0, placement.num_experts - 1))
    ids = np.full((NUM_DEVICES, 1, 1), expert, np.int32)
    chosen = slots_chosen(placement, ids, per_node=per_node, exact=False, devices=NUM_DEVICES)
    width = placement.num_slots // NUM_DEVICES
    alike: dict[tuple[Any, ...], list[int]] = {}
    for device in range(NUM_DEVICES):
        run = tuple(nearest(placement, expert, device, per_node or 1))
        homes = [slot // width for slot in run]
        near = device // (per_node or 1) in [home // (per_node or 1) for home in homes]
        if device not in homes:
            alike.setdefault((near, run), []).append(int(chosen[device, 0, 0]))
    for (_, run), slots in alike.items():
        counts = [slots.count(slot) for slot in run]
        assert max(counts) - min(counts) <= 1


def test_tokens_take_turns():
    """An expert that all tokens choose: as even as it can be without counting."""
    placement = Placement(*map(np.asarray, ([0, 0, 0, 1], [[0, 1, 2], [3, -1, -1]], [3, 1])))
    ids = np.zeros((4, 9, 1), np.int32)
    chosen = np.asarray(slots_chosen(placement, ids, per_node=None, exact=False, devices=4))
    assert np.bincount(chosen[3].ravel()).tolist() == [3, 3, 3]
    for device in range(3):
        assert np.all(chosen[device] == device)


@settings(max_examples=40, deadline=None)
@given(placement=few_shapes, per_node=nodes)
def test_locality_is_the_distance_to_the_nearest_replica(
    placement: Placement, per_node: int | None
):
    width, group = placement.num_slots // NUM_DEVICES, per_node or NUM_DEVICES
    for device in (0, 5):
        locality = locality_of(
            placement,
            device,
            num_experts=placement.num_experts,
            num_devices=NUM_DEVICES,
            devices_per_node=per_node,
        )
        for expert in range(placement.num_experts):
            homes = [s // width for s in slots_of(placement, expert)]
            on_node = device // group in [h // group for h in homes]
            want = 0 if device in homes else 1 if on_node else 2
            assert locality.distance[expert] == want
            assert locality.node[expert] == homes[0] // group


def test_locality_without_a_placement():
    got = locality_of(None, 1, num_experts=8, num_devices=4, devices_per_node=2)
    want = locality_of(contiguous(8), 1, num_experts=8, num_devices=4, devices_per_node=2)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert got.distance.tolist() == [1, 1, 0, 0, 2, 2, 2, 2]


def test_bad_numbers_of_devices():
    with pytest.raises(ValueError, match=r"^`near_replicas`: 8 slots must be divisible by num_dev"):
        near_replicas(contiguous(8), 0, num_devices=3)
    with pytest.raises(ValueError, match=r"num_devices \(4\) must be divisible by devices_per_node "
                       r"\(3\). Use None"):  # fmt: skip
        near_replicas(contiguous(8), 0, num_devices=4, devices_per_node=3)


@pytest.mark.parametrize("at_once", [1, 2, 4, 6])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_gradients_of_replicas_are_their_sum(
    num_devices: int, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """Also of two on one device, and however many experts are summed at a time. An infinite
    gradient stays with its expert, empty slots keep theirs.
    """
    num_experts, num_slots, shapes = 6, 16, {"a": (3, 2), "b": (5,)}
    monkeypatch.setattr(choice_module, "_TIED_BYTES", at_once * 4 * (3 * 2 + 5))
    rng = np.random.default_rng(at_once)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("expert",))
    spec = PartitionSpec("expert")

    def gradients(outer: Any, placement: balance.Placement) -> Any:
        def inner(weights: Any) -> Any:
            rank = jax.lax.axis_index("expert")
            tied = balance.tie_replicas(weights, placement, rank, ("expert",))
            return jax.tree.map(jnp.multiply, tied, outer)

        weights = jax.tree.map(jnp.zeros_like, outer)
        value, pull = jax.vjp(inner, weights)
        return pull(jax.tree.map(jnp.ones_like, value))[0]

    program = jax.jit(
        jax.shard_map(gradients, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    )
    for num_empty in (0, 0, 0, 3):
        placement = random_placement(rng, num_experts, num_slots, num_empty)
        held = placement.slot_experts
        outer = {
            name: rng.integers(-99, 99, (num_slots, *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        outer["b"][held == 2, 1] = np.inf
        got = program(outer, placement)
        for name, array in outer.items():
            want = array.copy()
            for expert in range(num_experts):
                want[held == expert] = array[held == expert].sum(0)
            np.testing.assert_array_equal(got[name], want)
    assert program._cache_size() == 1
