"""Routing against a direct computation in numpy, and its promises about odd input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe import routing as routing_lib
from jaxmoe.routing import RouterConfig, count_tokens_per_expert, update_bias

# One program for each shape and configuration, instead of one for each operation.
route = jax.jit(routing_lib.route, static_argnames=("top_k", "config"))

NUM_EXPERTS = 8
TOP_K = 3
# Float32 against float64: a softmax or sigmoid of moderate logits is good to a few units of 2**-23.
TOLERANCE = dict(rtol=2e-6, atol=1e-7)

CONFIGS = {
    "softmax": RouterConfig(),
    "softmax-raw-groups": RouterConfig(normalize=False, num_groups=4, top_groups=2),
    "softmax-topk_first-raw-groups": RouterConfig(
        topk_first=True, normalize=False, num_groups=2, top_groups=1
    ),
    "sigmoid-groups": RouterConfig(score="sigmoid", scale=2.5, num_groups=4, top_groups=2),
    "sigmoid-raw": RouterConfig(score="sigmoid", normalize=False, scale=0.5),
    "sigmoid-topk_first": RouterConfig(score="sigmoid", topk_first=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference_scores(logits, score):
    if score == "sigmoid":
        return [1 / (1 + np.exp(-value)) for value in logits]
    exps = [np.exp(value - max(logits)) for value in logits]
    return [value / sum(exps) for value in exps]


def reference_token(logits, top_k, config, bias):
    """One token in float64: ids, weights, normalised scores."""
    logits = [float(value) for value in logits]
    scores = reference_scores(logits, config.score)
    values = [
        s + float(b) for s, b in zip(logits if config.topk_first else scores, bias, strict=True)
    ]
    size = len(logits) // config.num_groups

    def group_score(group):
        return sum(sorted(values[group * size : (group + 1) * size])[-2:])

    groups = sorted(range(config.num_groups), key=lambda g: (-group_score(g), g))
    kept = groups[: config.top_groups]
    candidates = [i for i in range(len(logits)) if i // size in kept]
    ids = sorted(candidates, key=lambda i: (-values[i], i))[:top_k]
    if config.topk_first:
        weights = reference_scores([logits[i] for i in ids], config.score)
    else:
        weights = [scores[i] for i in ids]
    total = sum(weights) if config.normalize else 1.0
    return ids, [config.scale * w / total for w in weights], [s / sum(scores) for s in scores]


def reference_route(logits, top_k, config, bias=None, mask=None):
    bias = np.zeros(logits.shape[-1]) if bias is None else bias
    tokens = logits.shape[:-1]
    ids = np.full((*tokens, top_k), -1)
    weights, scores = np.zeros((*tokens, top_k)), np.zeros(logits.shape)
    for token in np.ndindex(tokens):
        if mask is None or mask[token]:
            ids[token], weights[token], scores[token] = reference_token(
                logits[token], top_k, config, bias
            )
    return ids, weights, scores


def assert_routes_as(routing, expected):
    ids, weights, scores = expected
    np.testing.assert_array_equal(routing.expert_ids, ids)
    np.testing.assert_allclose(routing.weights, weights, **TOLERANCE)
    np.testing.assert_allclose(routing.scores, scores, **TOLERANCE)
    assert routing.expert_ids.dtype == jnp.int32
    assert {array.dtype for array in routing[1:4]} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(routing.wanted_ids, ids)


@every_config
def test_routes_as_the_numpy_reference(config):
    logits, bias = 2 * normal(0, 4, 16, NUM_EXPERTS), normal(1, NUM_EXPERTS)
    mask = np.random.default_rng(2).random((4, 16)) < 0.8
    routing = route(jnp.asarray(logits), TOP_K, config, bias=bias, mask=jnp.asarray(mask))
    assert_routes_as(routing, reference_route(logits, TOP_K, config, bias, mask))
    np.testing.assert_array_equal(routing.logits, np.where(mask[..., None], logits, 0))


@pytest.mark.parametrize(
    "tokens, dtype",
    [
        ((), jnp.float32),
        ((0,), jnp.float32),
        ((5,), jnp.bfloat16),
        ((2, 0), jnp.bfloat16),
        ((2, 3, 2), jnp.float16),
    ],
    ids=str,
)
def test_any_leading_dimensions_and_dtype(tokens, dtype):
    logits = jnp.asarray(normal(3, *tokens, NUM_EXPERTS), dtype)
    expected = reference_route(np.asarray(logits, np.float32), TOP_K, RouterConfig())
    assert_routes_as(route(logits, TOP_K), expected)


def test_normalised_weights_sum_to_the_scale_where_the_scores_underflow():
    logits = jnp.asarray([[-200.0, -200.0, -300.0, -300.0]])
    routing = route(logits, 2, RouterConfig(score="sigmoid", topk_first=True, scale=2.0))
    np.testing.assert_array_equal(routing.weights, [[1.0, 1.0]])
    np.testing.assert_array_equal(routing.scores, [[0.5, 0.5, 0.0, 0.0]])


def test_ties_go_to_the_lowest_id():
    logits = jnp.asarray([[-0.0, 0.0, -0.0, 0.0, 0.0, -0.0, -1.0, 1.0]])
    for topk_first in (False, True):
        routing = route(logits, 4, RouterConfig(topk_first=topk_first))
        np.testing.assert_array_equal(routing.expert_ids, [[7, 0, 1, 2]])


def test_group_limited_selection_by_hand():
    # Group scores, each the sum of its two best: 5 + 0, 3 + 3, 4 + 1.5, 2 + 2.
    logits = jnp.asarray([[5.0, 0.0, -9.0, 3.0, 3.0, 2.9, 4.0, 1.5, 1.0, 2.0, 2.0, 2.0]])
    config = RouterConfig(topk_first=True, num_groups=4, top_groups=2)
    np.testing.assert_array_equal(route(logits, 5, config).expert_ids, [[6, 3, 4, 5, 7]])
    # Raising expert 1 by 2 makes the first group best (7), before the second (6).
    bias = jnp.zeros(12).at[1].set(2.0)
    np.testing.assert_array_equal(route(logits, 4, config, bias=bias).expert_ids, [[0, 3, 4, 5]])


def test_groups_of_one_expert_are_the_experts():
    logits = jnp.asarray(normal(4, 32, NUM_EXPERTS))
    config = RouterConfig(num_groups=NUM_EXPERTS, top_groups=TOP_K)
    for limited, free in zip(route(logits, TOP_K, config), route(logits, TOP_K), strict=True):
        np.testing.assert_array_equal(limited, free)


@pytest.mark.parametrize("bias_value", [-100.0, -np.inf, np.nan])
def test_selection_stays_in_the_surviving_group(bias_value):
    # Every biased score is negative or NaN; only group 1 (experts 4 to 7) survives.
    logits = jnp.asarray([[0.0, 0, 0, 0, 3, 3, 0, 0]])
    bias = jnp.full(8, -100.0).at[6].set(bias_value)
    config = RouterConfig(num_groups=2, top_groups=1)
    ids = route(logits, 4, config, bias=bias).expert_ids[0].tolist()
    assert ids[:2] == [4, 5] and set(ids) == {4, 5, 6, 7}


def test_bias_changes_the_choice_but_not_the_weights():
    logits = jnp.asarray(normal(5, 16, NUM_EXPERTS))
    config = RouterConfig(score="sigmoid", normalize=False)
    bias = jnp.zeros(NUM_EXPERTS).at[6].set(10.0)
    routing = route(logits, TOP_K, config, bias=bias)
    np.testing.assert_array_equal(routing.expert_ids[:, 0], 6)
    chosen = jnp.take_along_axis(jax.nn.sigmoid(logits), routing.expert_ids, axis=-1)
    np.testing.assert_array_equal(routing.weights, chosen)


@every_config
def test_gradient_of_the_weights(config):
    # Central differences of the float64 reference, at a point where no choice is near a tie.
    logits, bias = 2 * normal(6, 5, NUM_EXPERTS), normal(7, NUM_EXPERTS)
    cotangent, step = normal(8, 5, TOP_K), 1e-5

    def loss(logits, bias):
        return jnp.sum(route(logits, TOP_K, config, bias=bias).weights * cotangent)

    def reference_loss(logits):
        return np.sum(reference_route(logits, TOP_K, config, bias)[1] * cotangent)

    expected = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape):
        shift = np.zeros(logits.shape)
        shift[index] = step
        expected[index] = reference_loss(logits + shift) - reference_loss(logits - shift)
    grad_logits, grad_bias = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(logits), jnp.asarray(bias))
    np.testing.assert_allclose(grad_logits, expected / (2 * step), rtol=1e-4, atol=1e-6)
    assert np.any(np.asarray(grad_logits))
    np.testing.assert_array_equal(grad_bias, 0)


@every_config
def test_a_broken_token_is_visible_and_alone(config):
    logits = normal(9, 5, NUM_EXPERTS)
    broken = logits.copy()
    broken[2, 7], broken[3, 7] = np.nan, np.inf

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def routed(logits):
        routing = route(logits, TOP_K, config)
        return jnp.sum(jnp.sin(routing.weights)), routing

    (_, got), got_grad = routed(jnp.asarray(broken))
    (_, want), want_grad = routed(jnp.asarray(logits))
    assert np.all(np.isnan(got.weights[2:4])) and np.all(np.isnan(got.scores[2:4]))
    ids = np.sort(got.expert_ids[2:4])
    assert np.all(ids[:, 1:] > ids[:, :-1]) and ids.min() >= 0 and ids.max() < NUM_EXPERTS
    for left, right in zip((*got, got_grad), (*want, want_grad), strict=True):
        np.testing.assert_array_equal(left[:2], right[:2])
        np.testing.assert_array_equal(left[4], right[4])


@every_config
def test_minus_infinity_forbids_an_expert(config):
    logits, bias = normal(10, 16, NUM_EXPERTS), np.zeros(NUM_EXPERTS, np.float32)
    logits[:, 2], bias[2] = -np.inf, 50.0
    # Both groups survive, so that all but the forbidden expert are chosen.
    config = dataclasses.replace(config, num_groups=2, top_groups=2)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def routed(logits):
        routing = route(logits, NUM_EXPERTS, config, bias=bias)
        return jnp.sum(jnp.sin(routing.weights)), routing

    grads, routing = routed(logits)
    ids, weights = np.asarray(routing.expert_ids), np.asarray(routing.weights)
    np.testing.assert_array_equal(np.sort(ids[:, :7]), [[0, 1, 3, 4, 5, 6, 7]] * 16)
    np.testing.assert_array_equal(ids[:, 7], -1)
    assert np.all(np.isfinite(weights)) and np.all(weights[:, :7] > 0)
    np.testing.assert_array_equal(weights[:, 7], 0)
    np.testing.assert_array_equal(routing.scores[:, 2], 0)
    assert np.all(np.isfinite(grads))


def test_a_group_with_one_expert_left_ranks_above_one_with_none():
    logits = jnp.asarray([[-jnp.inf, -jnp.inf, -jnp.inf, 1.0]])
    config = RouterConfig(num_groups=2, top_groups=1, topk_first=True)
    routing = route(logits, 2, config)
    np.testing.assert_array_equal(routing.expert_ids, [[3, -1]])
    np.testing.assert_array_equal(routing.weights, [[1.0, 0.0]])


@every_config
def test_masked_tokens_choose_nothing_whatever_their_logits(config):
    logits = normal(11, 6, NUM_EXPERTS)
    logits[1], logits[2], logits[3], logits[4] = np.nan, np.inf, -np.inf, -np.inf
    mask = jnp.asarray([True, False, False, False, True, True])

    def loss(logits):
        routing = route(logits, TOP_K, config, mask=mask)
        values = routing.weights.sum() + jnp.sin(routing.scores).sum() + routing.logits.sum()
        return values, routing

    (_, routing), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logits))
    # Token 4 is not masked, but every expert is forbidden to it.
    np.testing.assert_array_equal(routing.expert_ids[1:5], -1)
    for array in (*routing[1:4], grads):
        np.testing.assert_array_equal(array[1:5], 0)
    assert np.all(np.isfinite(grads)) and np.all(np.asarray(routing.expert_ids)[[0, 5]] >= 0)


def test_jitter_multiplies_the_logits():
    logits, key = jnp.asarray(normal(12, 64, NUM_EXPERTS)), jax.random.key(0)
    routing = route(logits, TOP_K, RouterConfig(jitter=0.25), key=key)
    factor = np.asarray(routing.logits / logits)
    assert 0.75 - 1e-6 <= factor.min() < 0.8 and 1.2 < factor.max() <= 1.25 + 1e-6
    for noisy, plain in zip(routing, route(routing.logits, TOP_K), strict=True):
        np.testing.assert_array_equal(noisy, plain)
    again = route(logits, TOP_K, RouterConfig(jitter=0.25), key=key)
    np.testing.assert_array_equal(routing.logits, again.logits)


@pytest.mark.parametrize("name", ["softmax", "sigmoid-groups"])
def test_transformations_change_nothing(name):
    logits, bias = jnp.asarray(normal(13, 8, 4, NUM_EXPERTS)), jnp.asarray(normal(14, NUM_EXPERTS))
    mask = jnp.asarray(np.random.default_rng(15).random((8, 4)) < 0.7)

    def routed(logits, mask):
        return routing_lib.route(logits, TOP_K, CONFIGS[name], bias=bias, mask=mask)

    def with_gradient(function):
        def loss(logits):
            routing = function(logits, mask)
            return jnp.sum(jnp.sin(routing.weights)), routing

        (_, routing), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
        return *routing, grad

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(routed, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    expected = with_gradient(routed)
    for transformed in (jax.vmap(routed), sharded, jax.checkpoint(routed)):
        for got, want in zip(with_gradient(transformed), expected, strict=True):
            np.testing.assert_allclose(got, want, **TOLERANCE)


def test_update_bias_moves_towards_the_mean_load():
    bias = jnp.asarray([0.5, 0.0, -0.5, 0.25])
    loads = jnp.asarray([6, 2, 4, 4], jnp.int32)  # mean 4
    np.testing.assert_array_equal(update_bias(bias, loads, 0.125), [0.375, 0.125, -0.5, 0.25])
    np.testing.assert_array_equal(update_bias(bias, jnp.zeros(4, jnp.int32), 0.125), bias)
    half = jax.jit(update_bias)(bias.astype(jnp.bfloat16), loads, jnp.float32(0.125))
    assert half.dtype == jnp.bfloat16


def test_update_bias_balances_a_skewed_router():
    logits = jnp.asarray(
        normal(16, 512, NUM_EXPERTS) + 3 * np.eye(NUM_EXPERTS)[0].astype(np.float32)
    )
    config = RouterConfig(score="sigmoid")

    def loads(bias):
        return count_tokens_per_expert(
            route(logits, TOP_K, config, bias=bias).expert_ids, NUM_EXPERTS
        )

    step = jax.jit(lambda bias: update_bias(bias, loads(bias), 0.01))
    bias, mean = jnp.zeros(NUM_EXPERTS), 512 * TOP_K // NUM_EXPERTS
    assert loads(bias).max() > 2 * mean
    for _ in range(100):
        bias = step(bias)
    assert int(loads(bias).max()) < 1.1 * mean


def test_count_ignores_ids_out_of_range():
    ids = jnp.asarray([[0, 3], [-1, -1], [3, 4], [-4, 2**31 - 1]], jnp.int32)
    np.testing.assert_array_equal(count_tokens_per_expert(ids, 4), [1, 0, 0, 2])


@pytest.mark.parametrize(
    "setting, sentence",
    [
        (dict(score="relu"), r"score is 'relu'. Use one of \('softmax', 'sigmoid'\)"),
        (dict(scale=0.0), r"scale \(0.0\) must be finite and positive. Use 1.0"),
        (dict(scale=float("nan")), r"scale \(nan\) must be finite and positive"),
        (dict(num_groups=0), r"num_groups \(0\) must be at least 1"),
        (dict(top_groups=2), r"top_groups \(2\) must lie between 1 and num_groups \(1\)"),
        (dict(jitter=1.0), r"jitter \(1.0\) must be at least 0 and below 1"),
    ],
)
def test_config_errors(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        RouterConfig(**setting)


@pytest.mark.parametrize(
    "changes, error, sentence",
    [
        (
            dict(logits=jnp.zeros((4, 8), jnp.int32)),
            TypeError,
            r"logits are int32\[4, 8\]; wanted float",
        ),
        (dict(logits=jnp.float32(0)), TypeError, r"logits are float32\[\]; wanted"),
        (dict(top_k=0), ValueError, r"top_k \(0\) must lie between 1 and the 8 experts"),
        (
            dict(top_k=5, config=RouterConfig(num_groups=4, top_groups=2)),
            ValueError,
            r"top_k \(5\) must lie between 1 and the 4 experts .*Lower top_k or raise top_groups",
        ),
        (
            dict(config=RouterConfig(num_groups=3)),
            ValueError,
            r"the 8 experts of logits must be divisible by num_groups \(3\)",
        ),
        (dict(bias=jnp.zeros(4)), ValueError, r"bias has shape \(4,\); wanted \(8,\)"),
        (dict(mask=jnp.ones(4)), TypeError, r"mask is float32; wanted bool"),
        (dict(mask=jnp.ones(3, bool)), ValueError, r"mask has shape \(3,\); wanted \(4,\)"),
        (
            dict(config=RouterConfig(jitter=0.1)),
            ValueError,
            r"jitter is 0.1 but key is None. Give a",
        ),
    ],
)
def test_route_errors(changes, error, sentence):
    arguments = dict(logits=jnp.zeros((4, 8)), top_k=2) | changes
    with pytest.raises(error, match=sentence):
        routing_lib.route(**arguments)


def test_update_bias_error():
    with pytest.raises(ValueError, match=r"bias has shape \(4,\) and tokens_per_expert \(8,\)"):
        update_bias(jnp.zeros(4), jnp.zeros(8), 0.001)
