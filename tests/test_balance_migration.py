"""Migration keeps every bit, goes in whole steps, and is made when it pays."""

from __future__ import annotations

import functools
from typing import Any

import cases
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from placements import random_placement, zipf

from jaxmoe import balance
from jaxmoe.balance import MoveRule, contiguous, count_moves, imbalance, migration_steps

NUM_EXPERTS, NUM_SLOTS, MAX_MOVES = 10, 16, 5
DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int32")
seeds = st.integers(0, 2**32 - 1)


def make_group(name: str) -> Any:
    config = cases.Config(R=4, E=NUM_SLOTS, mesh=name) if name else cases.Config(R=1, mesh=None)
    config = cases.dataclasses.replace(config, E=NUM_SLOTS)
    return exchange.make_group(config, "cpu")


def weights() -> dict[str, np.ndarray]:
    """Rows of the experts; odd sizes, negative zeros and NaN."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((NUM_EXPERTS, 3, 5)).astype(np.float32)
    rows[0], rows[1, 0, 0] = -0.0, np.nan
    even = rng.standard_normal((NUM_EXPERTS, 8)).astype(np.float32)
    arrays = {d: rows.astype(jnp.dtype(d)) for d in DTYPES if d != "int32"}
    return arrays | {"int32": rng.integers(-9, 9, (NUM_EXPERTS, 2)), "even": even.astype("float16")}


def on_slots(group: Any, placement: balance.Placement) -> dict[str, jax.Array]:
    """The experts' rows where a placement wants them."""
    slots = np.asarray(placement.slot_experts)
    params = {name: rows[slots] for name, rows in weights().items()}
    if group.mesh is None:
        return jax.tree.map(jnp.asarray, params)
    return jax.device_put(params, NamedSharding(group.mesh, PartitionSpec(group.axis)))


def as_bytes(params: dict[str, Any], placement: balance.Placement) -> dict[str, bytes]:
    """The bits of all rows in use."""
    held = np.asarray(placement.slot_experts) >= 0
    return {name: np.asarray(a)[held].tobytes() for name, a in params.items()}


@functools.cache
def program(name: str) -> tuple[Any, Any]:
    group = make_group(name)
    return group, jax.jit(functools.partial(balance.migrate, group, max_moves=MAX_MOVES))


@pytest.mark.parametrize("name", ["", "data_expert", "tuple"])
def test_migration_keeps_every_bit(name: str):
    group, migrate = program(name)
    rng = np.random.default_rng(1)
    for old, new in (
        (contiguous(NUM_EXPERTS, NUM_SLOTS), random_placement(rng, NUM_EXPERTS, NUM_SLOTS)),
        (random_placement(rng, NUM_EXPERTS, NUM_SLOTS, 3), contiguous(NUM_EXPERTS, NUM_SLOTS)),
        (contiguous(NUM_EXPERTS, NUM_SLOTS), contiguous(NUM_EXPERTS, NUM_SLOTS)),
    ):
        params, placement = on_slots(group, old), old
        for step in migration_steps(old, new, MAX_MOVES):
            params, placement = jax.block_until_ready(migrate(params, placement, step))
            assert as_bytes(params, placement) == as_bytes(on_slots(group, step), step)
        np.testing.assert_array_equal(placement.slot_experts, new.slot_experts)
    assert migrate._cache_size() <= 2  # placements on the host, and those that migrate returned


def test_too_many_moves_leave_everything_in_place():
    group, migrate = program("data_expert")
    old = contiguous(NUM_EXPERTS, NUM_SLOTS)
    new = random_placement(np.random.default_rng(2), NUM_EXPERTS, NUM_SLOTS)
    assert count_moves(old, new) > MAX_MOVES
    params, placement = migrate(on_slots(group, old), old, new)
    for field, array in vars(old).items():
        np.testing.assert_array_equal(getattr(placement, field), array)
    assert as_bytes(params, old) == as_bytes(on_slots(group, old), old)


def test_program_moves_single_experts():
    """The compiled program has all-reduces of one row, and gathers nothing."""
    group, migrate = program("data_expert")
    old = contiguous(NUM_EXPERTS, NUM_SLOTS)
    params = {"a": on_slots(group, old)["float32"]}
    text = migrate.lower(params, old, old).compile().as_text()
    assert "all-reduce" in text and "s32[3,5]" in text
    assert "all-gather" not in text and "all-to-all" not in text


@settings(max_examples=60, deadline=None)
@given(seed=seeds, max_moves=st.integers(2, 6), num_empty=st.integers(0, 3))
def test_every_step_is_whole(seed: int, max_moves: int, num_empty: int):
    rng = np.random.default_rng(seed)
    old = random_placement(rng, NUM_EXPERTS, NUM_SLOTS, num_empty)
    new = random_placement(rng, NUM_EXPERTS, NUM_SLOTS, int(rng.integers(4)))
    place, total = old, 0
    for step in migration_steps(old, new, max_moves):
        assert 0 < np.sum(place.slot_experts != step.slot_experts) <= max_moves
        assert np.all(step.counts >= 1)
        place, total = step, total + count_moves(place, step)
    np.testing.assert_array_equal(place.slot_experts, new.slot_experts)
    assert total <= 2 * NUM_SLOTS
    assert migration_steps(new, new, max_moves) == []


@settings(max_examples=40, deadline=None)
@given(seed=seeds, num_nodes=st.sampled_from([1, 2, 4]))
def test_renumbering_devices_saves_moves(seed: int, num_nodes: int):
    rng = np.random.default_rng(seed)
    old = random_placement(rng, 40, 64, 2)
    held = old.slot_experts.reshape(num_nodes, 8 // num_nodes, 8)
    # The same experts on renumbered nodes, devices and slots: no move is needed.
    held = rng.permuted(rng.permutation(held)[:, rng.permutation(8 // num_nodes)], axis=-1)
    new = balance.placement_of(held.reshape(-1), 40)
    aligned = balance.align(new, old, num_devices=8, num_nodes=num_nodes)
    assert count_moves(old, aligned) == 0
    # And some other placement: the devices' contents stay together.
    other = random_placement(rng, 40, 64)
    aligned = balance.align(other, old, num_devices=8, num_nodes=num_nodes)
    assert count_moves(old, aligned) <= count_moves(old, other)
    contents = [
        sorted(map(tuple, np.sort(np.asarray(p.slot_experts).reshape(8, 8), -1).tolist()))
        for p in (aligned, other)
    ]
    assert contents[0] == contents[1]


@settings(max_examples=40, deadline=None)
@given(seed=seeds, max_moves=st.integers(1, 12), slow=st.booleans())
def test_improvement_needs_few_moves(seed: int, max_moves: int, slow: bool):
    rng = np.random.default_rng(seed)
    load = rng.permutation(zipf(40))
    speeds = [0.5] * 2 + [1.0] * 6 if slow else None
    old = random_placement(rng, 40, 64, int(rng.integers(3)))
    new = balance.improve(load, old, num_devices=8, max_moves=max_moves, speeds=speeds)
    assert count_moves(old, new) <= max_moves
    before, after = (imbalance(p, load, 8, speeds) for p in (old, new))
    assert after < before or count_moves(old, new) == 0
    assert repeated(new) <= repeated(old)


def repeated(placement: balance.Placement) -> int:
    """Slots of the 8 devices whose expert lies in an earlier slot of the device."""
    rows = np.asarray(placement.slot_experts).reshape(8, -1).tolist()
    held = [[e for e in row if e >= 0] for row in rows]
    return sum(len(row) - len(set(row)) for row in held)


def test_few_moves_follow_a_drifting_load():
    rng = np.random.default_rng(0)
    load = rng.permutation(zipf(256))
    placement = balance.place(load, num_devices=32, num_replicas=288)
    drifted = load * rng.lognormal(0, 0.2, 256)
    before = imbalance(placement, drifted, 32)
    new = balance.improve(drifted, placement, num_devices=32, max_moves=16)
    assert before > 1.1
    assert imbalance(new, drifted, 32) < 1.06


def test_a_migration_is_made_when_it_pays():
    load, old = zipf(32), contiguous(32, 40)

    def moves(**rule: Any) -> int:
        new = balance.rebalance(load, old, num_devices=8, rule=MoveRule(**rule))
        return count_moves(old, new)

    assert 0 < moves(max_moves=4) <= 4
    assert moves(max_moves=4, min_gain=0.9) == 0
    assert moves(max_moves=4, move_cost=10.0, horizon=1) == 0
    assert moves(max_moves=4, move_cost=10.0, horizon=1000) > 0
    rule = MoveRule(min_gain=0.1, horizon=10, move_cost=1.0)
    assert rule.pays(1.5, 1.3, 1) and not rule.pays(1.5, 1.3, 2)
    assert not rule.pays(1.5, 1.4, 0) and not rule.pays(1.5, 1.36, 1)


def test_bad_input():
    group, _ = program("data_expert")
    old = contiguous(NUM_EXPERTS, NUM_SLOTS)
    params = on_slots(group, old)
    new = random_placement(np.random.default_rng(2), NUM_EXPERTS, NUM_SLOTS)
    with pytest.raises(ValueError, match=r"^`migrate`: \d+ slots change, max_moves is 5. Go there "
                       "in the steps of"):  # fmt: skip
        balance.migrate(group, params, old, new, max_moves=5)
    with pytest.raises(ValueError, match=r"^`migrate`: params\['bias'\] has shape \[10\]; wanted "
                       r"\[16, ...\], a row for each slot"):  # fmt: skip
        balance.migrate(group, {"bias": jnp.zeros(10)}, old, old)
    with pytest.raises(
        ValueError, match=r"^`migrate: new`: it places 12 experts, the model has 10"
    ):
        balance.migrate(group, params, old, contiguous(12, NUM_SLOTS))
    with pytest.raises(ValueError, match=r"^`migrate: old`: it fills 12 slots, the group has 16. "
                       "If devices left"):  # fmt: skip
        balance.migrate(group, params, contiguous(10, 12), old)
    few = balance.placement_of(old.slot_experts, 10, max_replicas=2)
    with pytest.raises(ValueError, match=r"^`migrate`: the placements have room for 7 and 2 repl"):
        balance.migrate(group, params, old, few)
    with pytest.raises(ValueError, match=r"^`migrate`: max_moves must be at least 1, got 0"):
        balance.migrate(group, params, old, old, max_moves=0)
    with pytest.raises(ValueError, match=r"^`migration_steps`: max_moves \(1\) must be at least 2"):
        migration_steps(old, new, 1)
    with pytest.raises(ValueError, match=r"^`MoveRule`: min_gain \(nan\) must be finite"):
        MoveRule(min_gain=float("nan"))
    with pytest.raises(ValueError, match=r"^`improve`: load holds nan"):
        balance.improve([np.nan] * 10, old, num_devices=4, max_moves=2)
    with pytest.raises(ValueError, match=r"^`imbalance`: speeds are .* wanted 4 positive numbers"):
        imbalance(old, np.ones(10), 4, [1.0])
