"""Router losses against a direct computation in numpy, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmoe import losses as losses_lib
from jaxmoe import routing as routing_lib
from jaxmoe.routing import RouterConfig

# One program for each shape and configuration, instead of one for each operation.
route = jax.jit(routing_lib.route, static_argnames=("top_k", "config"))
load_balance_loss = jax.jit(losses_lib.load_balance_loss, static_argnames="axis_name")
sequence_balance_loss = jax.jit(losses_lib.sequence_balance_loss, static_argnames="axis_name")
router_z_loss = jax.jit(losses_lib.router_z_loss, static_argnames="axis_name")
router_entropy = jax.jit(losses_lib.router_entropy, static_argnames="axis_name")

BATCH, LENGTH, NUM_EXPERTS, TOP_K = 8, 6, 8, 2
# Float32 sums of some 50 tokens against float64.
TOLERANCE = dict(rtol=3e-6)


def example(seed=0, score="softmax"):
    """A routed batch whose masked tokens are spread unevenly: sequence 3 has none that counts."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.standard_normal((BATCH, LENGTH, NUM_EXPERTS)), jnp.float32)
    mask = rng.random((BATCH, LENGTH)) < rng.random((BATCH, 1))
    mask[0], mask[3] = True, False
    mask = jnp.asarray(mask)
    return route(logits, TOP_K, RouterConfig(score=score), mask=mask), mask


def reference_balance(scores, ids):
    """Both balance losses of one set of tokens: E sum_i f_i P_i, by loops."""
    scores, ids = np.asarray(scores, np.float64), np.asarray(ids)
    num_experts = scores.shape[-1]
    counts, score_sums, tokens = np.zeros(num_experts), np.zeros(num_experts), 0
    for row, chosen in zip(scores, ids, strict=True):
        if chosen[0] < 0:
            continue
        tokens += 1
        score_sums += row
        for expert in chosen:
            counts[expert] += 1
    if tokens == 0:
        return None
    return num_experts * np.sum(counts / (tokens * ids.shape[-1]) * score_sums / tokens)


def reference_sequence_balance(scores, ids):
    losses = [reference_balance(s, i) for s, i in zip(scores, ids, strict=True)]
    return np.mean([loss for loss in losses if loss is not None])


def reference_z_loss(logits, mask):
    rows = np.asarray(logits, np.float64)[np.asarray(mask)]
    return np.mean([np.log(np.sum(np.exp(row))) ** 2 for row in rows])


def reference_entropy(scores, mask):
    rows = np.asarray(scores, np.float64)[np.asarray(mask)]
    return np.mean([-sum(s * np.log(s) for s in row) for row in rows])


def all_losses(routing, mask, axis_name=None):
    return {
        "load_balance": load_balance_loss(routing.scores, routing.expert_ids, axis_name=axis_name),
        "sequence": sequence_balance_loss(routing.scores, routing.expert_ids, axis_name=axis_name),
        "z": router_z_loss(routing.logits, mask=mask, axis_name=axis_name),
        "entropy": router_entropy(routing.scores, axis_name=axis_name),
    }


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_equal_the_numpy_reference(score):
    routing, mask = example(score=score)
    losses = all_losses(routing, mask)
    scores, ids = np.asarray(routing.scores), np.asarray(routing.expert_ids)
    expected = {
        "load_balance": reference_balance(scores.reshape(-1, NUM_EXPERTS), ids.reshape(-1, TOP_K)),
        "sequence": reference_sequence_balance(scores, ids),
        "z": reference_z_loss(routing.logits, mask),
        "entropy": reference_entropy(scores, mask),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name], value, **TOLERANCE, err_msg=name)
        assert losses[name].shape == () and losses[name].dtype == jnp.float32


def test_closed_forms():
    """Powers of two throughout, so that all but the logarithms are exact."""
    uniform = np.full((4, 2, 4), 0.25, np.float32)
    even = np.array([[[0], [1]], [[2], [3]]] * 2, np.int32)
    pairs = np.array([[[0, 1], [2, 3]]] * 4, np.int32)
    # Each sequence sends all its tokens to one expert, but each to another one.
    one_hot = np.repeat(np.eye(4, dtype=np.float32)[:, None], 2, axis=1)
    own = np.repeat(np.arange(4, dtype=np.int32)[:, None, None], 2, axis=1)
    assert load_balance_loss(uniform, even) == load_balance_loss(uniform, pairs) == 1
    assert sequence_balance_loss(uniform, pairs) == 1
    assert load_balance_loss(one_hot, own) == 1
    assert sequence_balance_loss(one_hot, own) == 4
    assert load_balance_loss(one_hot, np.roll(own, 1, axis=0)) == 1
    assert sequence_balance_loss(one_hot, np.roll(own, 1, axis=0)) == 0
    assert router_entropy(one_hot) == 0
    np.testing.assert_allclose(router_entropy(uniform), np.log(4), rtol=1e-6)
    zeros = np.zeros((4, 8), np.float32)
    np.testing.assert_allclose(router_z_loss(zeros), np.log(8) ** 2, rtol=1e-6)


def test_masked_tokens_count_for_nothing():
    routing, mask = example()
    keep = np.asarray(mask)
    scores, ids, logits = (
        np.array(x) for x in (routing.scores, routing.expert_ids, routing.logits)
    )
    compact = load_balance_loss(scores[keep], ids[keep]), router_z_loss(logits[keep])
    sequence = sequence_balance_loss(scores, ids)
    scores[~keep] = logits[~keep] = np.nan
    z_loss, grad = jax.jit(jax.value_and_grad(lambda x: router_z_loss(x, mask=mask)))(logits)
    np.testing.assert_allclose((load_balance_loss(scores, ids), z_loss), compact, **TOLERANCE)
    assert sequence_balance_loss(scores, ids) == sequence
    np.testing.assert_array_equal(grad[~keep], 0)
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (2, 6)], ids=["no_batch", "no_length", "masked"])
def test_no_token_gives_zero_and_a_zero_gradient(shape):
    mask = jnp.zeros(shape, bool)

    def total(logits):
        return sum(all_losses(route(logits, TOP_K, mask=mask), mask).values())

    ones = np.ones((*shape, NUM_EXPERTS), np.float32)
    loss, grad = jax.jit(jax.value_and_grad(total))(ones)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)


def test_nan_is_visible():
    routing, mask = example()
    logits = routing.logits.at[0, 0, 0].set(jnp.nan)
    broken = route(logits, TOP_K, mask=mask)
    assert all(np.isnan(value) for value in all_losses(broken, mask).values())


def losses_of_logits(logits, mask, axis_name=None):
    routing = route(logits, TOP_K, RouterConfig(score="sigmoid"), mask=mask)
    return all_losses(routing, mask, axis_name)


@pytest.mark.parametrize("axis_name", ["expert", ("data", "expert")], ids=str)
def test_sharded_losses_are_those_of_the_whole_batch(axis_name):
    routing, mask = example(seed=1)
    sizes = (1, 8) if axis_name == "expert" else (2, 4)
    mesh = jax.make_mesh(sizes, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    tokens = P(axis_name)

    def total(logits, mask):
        losses = losses_of_logits(logits, mask, axis_name)
        return sum(losses.values()), losses

    # Replicated results (P()) are only accepted where every device provably holds the same value.
    sharded = jax.shard_map(total, mesh=mesh, in_specs=tokens, out_specs=P())
    grad_inside = jax.shard_map(
        jax.grad(total, has_aux=True), mesh=mesh, in_specs=tokens, out_specs=(tokens, P())
    )

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def whole_batch(logits, mask):
        losses = losses_of_logits(logits, mask)
        return sum(losses.values()), losses

    expected_grad, expected = whole_batch(routing.logits, mask)
    for function in (jax.grad(sharded, has_aux=True), grad_inside):
        grad, losses = jax.jit(function)(routing.logits, mask)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-7)
        for name, value in expected.items():
            np.testing.assert_allclose(losses[name], value, **TOLERANCE, err_msg=name)


def test_sharded_z_loss_without_a_mask():
    logits = example()[0].logits
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda x: router_z_loss(x, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(sharded)(logits), router_z_loss(logits), **TOLERANCE)


def test_gradient_of_the_balance_loss_is_the_load():
    routing, mask = example()
    grad = jax.jit(jax.grad(load_balance_loss))(routing.scores, routing.expert_ids)
    ids, mask = np.asarray(routing.expert_ids), np.asarray(mask)
    counts = np.array([np.sum(ids == expert) for expert in range(NUM_EXPERTS)])
    row = NUM_EXPERTS * counts / counts.sum() / mask.sum()
    np.testing.assert_allclose(grad, np.where(mask[..., None], row, 0), **TOLERANCE)


def test_gradients_stay_finite_where_scores_are_zero():
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf, 2.0], [-1000.0, 0.0, 0.0, 1000.0]])

    def total(logits):
        mask = jnp.ones(2, bool)
        return sum(all_losses(route(logits, TOP_K, mask=mask), mask).values())

    loss, grad = jax.jit(jax.value_and_grad(total))(logits)
    assert np.isfinite(loss) and np.all(np.isfinite(grad)) and np.any(np.asarray(grad))


def test_errors():
    scores, ids = jnp.zeros((4, 8)), jnp.zeros((3, 2), jnp.int32)
    for loss in (losses_lib.load_balance_loss, losses_lib.sequence_balance_loss):
        with pytest.raises(
            ValueError, match=rf"`{loss.__name__}`: scores \(4, 8\) and expert_ids \(3, 2\)"
        ):
            loss(scores, ids)
    with pytest.raises(ValueError, match=r"scores have shape \(8,\); wanted \[..., S, E\]"):
        sequence_balance_loss(scores[0], ids[0])
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); wanted \(4,\)"):
        router_z_loss(scores, mask=jnp.ones(3, bool))
