"""`LoadStatistics` is a decayed average that starts unbiased, in a scan as in a checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import balance

NUM_LAYERS, NUM_EXPERTS, NUM_DEVICES, DECAY = 2, 6, 3, 0.75


def observation(rng: np.random.Generator) -> balance.Observation:
    """Integers for all layers; sums with powers of 3/4 are exact."""
    shapes = ((NUM_EXPERTS,), (NUM_EXPERTS, NUM_EXPERTS), (NUM_DEVICES, NUM_DEVICES))
    counts = (rng.integers(0, 9, (NUM_LAYERS, *s)).astype(np.float32) for s in shapes)
    return balance.Observation(*map(jnp.asarray, counts))


@pytest.fixture
def empty() -> balance.LoadStatistics:
    return balance.no_statistics(NUM_LAYERS, NUM_EXPERTS, NUM_DEVICES)


def test_average_decays_without_bias(empty):
    rng = np.random.default_rng(0)
    seen = [observation(rng) for _ in range(4)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *seen)

    @jax.jit
    def run(stats, stacked):
        return jax.lax.scan(lambda s, o: (balance.update(s, o, decay=DECAY), None), stats, stacked)

    mean = run(empty, stacked)[0].mean()
    powers = DECAY ** np.arange(3, -1, -1)
    for name in ("tokens_per_expert", "together", "traffic"):
        all_steps = np.stack([getattr(o, name) for o in seen])
        want = np.tensordot(powers, all_steps, 1) / powers.sum()
        np.testing.assert_allclose(getattr(mean, name), want, rtol=1e-6)
    np.testing.assert_array_equal(
        balance.expert_load(run(empty, stacked)[0]), mean.tokens_per_expert
    )


def test_first_step_counts_whole(empty):
    observed = observation(np.random.default_rng(1))
    mean = balance.update(empty, observed, decay=0.99).mean()
    np.testing.assert_allclose(mean.together, observed.together, rtol=1e-6)
    assert not np.any(empty.mean().traffic)


def test_layers_one_by_one(empty):
    observed = observation(np.random.default_rng(2))
    one = jax.jit(
        lambda stats, layer: balance.update(
            stats, jax.tree.map(lambda a: a[layer], observed), layer=layer
        )
    )
    stats = one(empty, 1)
    assert not np.any(stats.mean().tokens_per_expert[0])
    together = balance.update(empty, observed)
    for got, want in zip(jax.tree.leaves(one(stats, 0)), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(got, want)


def test_statistics_are_arrays_of_a_checkpoint(empty, tmp_path):
    import orbax.checkpoint as ocp

    stats = balance.update(empty, observation(np.random.default_rng(3)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stats", {"load": stats})
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "stats", {"load": empty})["load"]
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(stats), strict=True):
        np.testing.assert_array_equal(got, want)


def test_observation_counts_each_destination_once():
    ids = jnp.array([[0, 1, 5], [4, 5, -1], [-1, -1, -1], [2, 9, -2]], jnp.int32)
    observed = balance.observe(ids, num_experts=6, num_devices=3, device=1)
    assert observed.tokens_per_expert.tolist() == [1, 1, 1, 0, 1, 2]
    assert observed.traffic.tolist() == [[0, 0, 0], [1, 1, 2], [0, 0, 0]]
    want = np.zeros((6, 6))
    for chosen in ([0, 1, 5], [4, 5], [2]):
        want[np.ix_(chosen, chosen)] += 1
    np.testing.assert_array_equal(observed.together, want)
    # Experts 0 and 5 lie in slots of device 2 now.
    slots = jnp.array([[4, 1, 5], [3, 5, -1], [-1, -1, -1], [2, -2, -2]], jnp.int32)
    moved = balance.observe(ids, slots, num_experts=6, num_devices=3, device=1)
    assert moved.traffic.tolist() == [[0, 0, 0], [1, 2, 2], [0, 0, 0]]


def test_statistics_of_another_model(empty):
    other = balance.no_statistics(NUM_LAYERS, NUM_EXPERTS + 1, NUM_DEVICES)
    with pytest.raises(ValueError, match=r"^`update`: observed has shapes .*\(2, 6\).*the statist.*"
                       r"\(2, 7\).*Make them with `no_statistics`"):  # fmt: skip
        balance.update(other, observation(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"^`observe`: 6 slots must be divisible by num_devices"):
        balance.observe(jnp.zeros((2, 2), jnp.int32), num_experts=6, num_devices=4)
