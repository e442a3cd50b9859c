"""Routing that looks at where the experts are: penalties, two stages, few nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxmoe import routing as routing_lib
from jaxmoe.routing import Locality, RouterConfig

NUM_TOKENS, NUM_EXPERTS, NUM_NODES, TOP_K = 6, 12, 3, 3
route = jax.jit(routing_lib.route, static_argnames=("top_k", "config"))
# Few distinct values, so that ties and forbidden experts are common.
value = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, -np.inf])
broken_logits = arrays(
    np.float32, (NUM_TOKENS, NUM_EXPERTS), elements=st.sampled_from([0.0, 1.0, -np.inf, np.nan])
)
some_logits = arrays(np.float32, (NUM_TOKENS, NUM_EXPERTS), elements=value)
distances = arrays(np.int32, NUM_EXPERTS, elements=st.integers(0, 2))
nodes = arrays(np.int32, NUM_EXPERTS, elements=st.integers(0, NUM_NODES - 1))
SCORES = [RouterConfig(topk_first=True), RouterConfig(score="sigmoid", scale=2.0)]
OPTIONS = [
    dict(device_penalty=0.25, node_penalty=0.5),
    dict(local_slack=0.5),
    dict(num_nodes=NUM_NODES, top_nodes=2),
    dict(device_penalty=0.1, local_slack=0.2, num_nodes=NUM_NODES, top_nodes=1),
]


def make(config: RouterConfig, **options: Any) -> RouterConfig:
    return dataclasses.replace(config, **options)


def values_of(config: RouterConfig, logits: np.ndarray) -> np.ndarray:
    """What experts are selected by, without a bias; as the router rounds it."""
    values = logits if config.topk_first else np.asarray(jax.nn.sigmoid(jnp.asarray(logits)))
    return np.asarray(values)


@settings(max_examples=40, deadline=None)
@given(
    logits=st.one_of(some_logits, broken_logits),
    distance=distances,
    node=nodes,
    base=st.sampled_from(SCORES),
    options=st.sampled_from(OPTIONS),
)
def test_choices_stay_valid(logits, distance, node, base, options):
    """Distinct, allowed, best first, and weighted as any other choice."""
    config, locality = make(base, **options), Locality(distance, node)
    ids, weights, *_ = map(np.asarray, route(logits, TOP_K, config, locality=locality))
    for token in range(NUM_TOKENS):
        mine = ids[token][ids[token] >= 0]
        assert len(set(mine)) == len(mine)
        np.testing.assert_array_equal(weights[token][ids[token] < 0], 0)
        if np.isnan(logits[token]).any():
            assert np.all(np.isnan(weights[token][ids[token] >= 0])) and len(mine)
            continue
        assert np.all(logits[token][mine] != -np.inf)
        assert len(mine) or np.all(logits[token] == -np.inf)
        if len(mine):
            np.testing.assert_allclose(weights[token].sum(), config.scale, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(logits=some_logits, distance=distances, base=st.sampled_from(SCORES))
def test_penalty_is_a_bias_that_no_weight_sees(logits, distance, base):
    locality = Locality(distance, np.zeros(NUM_EXPERTS, np.int32))
    config = make(base, device_penalty=0.25, node_penalty=0.5)
    bias = -np.float32([0.0, 0.25, 0.75])[distance]
    got = route(logits, TOP_K, config, locality=locality)
    for a, b in zip(got, route(logits, TOP_K, base, bias=bias), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    logits=some_logits,
    distance=distances,
    slack=st.sampled_from([0.0, 0.4, 3.0]),
    base=st.sampled_from(SCORES),
)
def test_local_experts_go_first_where_they_are_good_enough(logits, distance, slack, base):
    locality = Locality(distance, np.zeros(NUM_EXPERTS, np.int32))
    config = make(base, local_slack=slack)
    ids = np.asarray(route(logits, TOP_K, config, locality=locality).expert_ids)
    plain = np.asarray(route(logits, TOP_K, base).expert_ids)
    for token in range(NUM_TOKENS):
        values = values_of(base, logits[token])
        order = [e for e in np.argsort(-values, kind="stable") if logits[token, e] != -np.inf]
        mine = [e for e in ids[token].tolist() if e >= 0]
        assert len(mine) == min(TOP_K, len(order)) == np.sum(plain[token] >= 0)
        if len(order) < TOP_K:
            continue
        last = np.float32(values[order[TOP_K - 1]])
        good = [e for e in order if distance[e] == 0 and values[e] >= last - np.float32(slack)]
        rest = [e for e in order if e not in good]
        assert set(mine) == set((good + rest)[:TOP_K])
        assert np.all(np.diff(values[mine]) <= 0)


@settings(max_examples=40, deadline=None)
@given(
    logits=some_logits,
    node=nodes,
    top_nodes=st.integers(1, NUM_NODES),
    base=st.sampled_from(SCORES),
)
def test_a_token_reaches_few_nodes(logits, node, top_nodes, base):
    locality = Locality(np.zeros(NUM_EXPERTS, np.int32), node)
    config = make(base, num_nodes=NUM_NODES, top_nodes=top_nodes)
    ids = np.asarray(route(logits, TOP_K, config, locality=locality).expert_ids)
    for token in range(NUM_TOKENS):
        assert len({node[e] for e in ids[token] if e >= 0}) <= top_nodes


@settings(max_examples=40, deadline=None)
@given(logits=some_logits, top=st.integers(1, NUM_NODES), base=st.sampled_from(SCORES))
def test_nodes_of_consecutive_experts_are_groups(logits, top, base):
    node = np.repeat(np.arange(NUM_NODES, dtype=np.int32), NUM_EXPERTS // NUM_NODES)
    locality = Locality(np.zeros(NUM_EXPERTS, np.int32), node)
    by_node = make(base, num_nodes=NUM_NODES, top_nodes=top)
    by_group = make(base, num_groups=NUM_NODES, top_groups=top)
    got = route(logits, TOP_K, by_node, locality=locality)
    for a, b in zip(got, route(logits, TOP_K, by_group), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_the_same_choice(options: dict[str, Any]):
    """The selection takes no gradient: the weights' one is that of the chosen experts' scores."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((NUM_TOKENS, NUM_EXPERTS)).astype(np.float32)
    locality = Locality(
        jnp.asarray(rng.integers(0, 3, NUM_EXPERTS), jnp.int32),
        jnp.arange(NUM_EXPERTS, dtype=jnp.int32) % NUM_NODES,
    )
    config = RouterConfig(score="sigmoid", **options)
    ids = routing_lib.route(logits, TOP_K, config, locality=locality).expert_ids
    assert np.any(ids != routing_lib.route(logits, TOP_K, RouterConfig(score="sigmoid")).expert_ids)
    wave = jnp.cos(jnp.arange(ids.size, dtype=jnp.float32)).reshape(ids.shape)

    def routed(logits: Any) -> Any:
        weights = routing_lib.route(logits, TOP_K, config, locality=locality).weights
        return jnp.sum(weights * wave)

    def formula(logits: Any) -> Any:
        scores = jnp.take_along_axis(jax.nn.sigmoid(logits), jnp.maximum(ids, 0), -1)
        scores = jnp.where(ids >= 0, scores, 0.0)
        return jnp.sum(scores / scores.sum(-1, keepdims=True) * wave)

    got, want = (jax.jit(jax.grad(f))(logits) for f in (routed, formula))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            dict(device_penalty=-1.0),
            r"device_penalty \(-1.0\) must be finite and at least 0. Use 0",
        ),
        (dict(node_penalty=float("nan")), r"node_penalty \(nan\) must be finite"),
        (dict(local_slack=-0.1), r"local_slack \(-0.1\) must be .* Use None to switch it off"),
        (dict(top_nodes=2), r"top_nodes \(2\) must lie between 1 and num_nodes \(1\)"),
        (dict(num_nodes=2, top_nodes=0), r"top_nodes \(0\) must lie between 1 and num_nodes \(2\)"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=rf"^`RouterConfig`: {sentence}"):
        RouterConfig(**options)


def test_bad_locality():
    logits = np.zeros((2, 8), np.float32)
    config = RouterConfig(num_nodes=4, top_nodes=1)
    with pytest.raises(ValueError, match=r"^`route`: the router has .* but locality is None"):
        routing_lib.route(logits, 2, config)
    short = Locality(np.zeros(7, np.int32), np.zeros(8, np.int32))
    with pytest.raises(ValueError, match=r"^`route`: locality.distance has shape \(7,\); wanted "):
        routing_lib.route(logits, 2, config, locality=short)
    fits = Locality(np.zeros(8, np.int32), np.zeros(8, np.int32))
    with pytest.raises(ValueError, match=r"^`route`: top_k \(3\) is more than the 2 experts that "
                       "top_nodes=1 of num_nodes=4 have"):  # fmt: skip
        routing_lib.route(logits, 3, config, locality=fits)
