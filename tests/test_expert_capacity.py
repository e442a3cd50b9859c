"""Routing that bounds what each expert takes: against plain Python, and its promises."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import cases
import dense
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec as P
from placements import random_placement

import jaxmoe
from jaxmoe import routing as routing_lib
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig
from jaxmoe.routing import RouterConfig

NUM_TOKENS, NUM_EXPERTS, TOP_K = 7, 6, 3
route = jax.jit(routing_lib.route, static_argnames=("top_k", "config"))
# Few distinct values, so that ties and forbidden experts are common.
value = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, -np.inf])
some_logits = arrays(np.float32, (NUM_TOKENS, NUM_EXPERTS), elements=value)
bases = st.sampled_from(
    [
        RouterConfig(score="sigmoid", expert_capacity_factor=1.0),
        RouterConfig(topk_first=True, scale=2.0, expert_capacity_factor=0.7, capacity_retries=1),
        RouterConfig(expert_capacity_factor=1.25, capacity_retries=3, num_groups=2, top_groups=2),
    ]
)


def room_of(factor: float, num_choices: int, replicas: list[int]) -> list[int]:
    total = math.ceil(Fraction(factor).limit_denominator(1000) * num_choices)
    return [n * math.ceil(Fraction(total, sum(replicas))) for n in replicas]


def reference(
    wanted: Any, values: Any, scores: Any, room: list[int], retries: int
) -> list[list[int]]:
    """The rule, choice by choice: the experts that each token holds in the end."""
    held: list[list[int]] = [[] for _ in wanted]
    left = list(room)
    asks = [(t, int(e)) for t, ids in enumerate(wanted) for e in ids if e >= 0]
    for attempt in range(retries + 1):
        # The largest score first, of equal ones the first token.
        refused: Counter[int] = Counter()
        for t, e in sorted(asks, key=lambda ask: (-scores[ask[0]][ask[1]], ask[0])):
            if left[e]:
                left[e] -= 1
                held[t].append(e)
            else:
                refused[t] += 1
        asks = []
        for t, count in refused.items() if attempt < retries else ():
            can = [e for e, n in enumerate(left) if n and e not in held[t]]
            can = [e for e in can if values[t][e] > -np.inf]
            asks += [(t, e) for e in sorted(can, key=lambda e: (-values[t][e], e))[:count]]
    return held


@settings(max_examples=60, deadline=None)
@given(logits=some_logits, config=bases, seed=st.integers(0, 2**32 - 1))
def test_equals_the_rule_choice_by_choice(logits: np.ndarray, config: RouterConfig, seed: int):
    rng = np.random.default_rng(seed)
    replicas = rng.integers(1, 4, NUM_EXPERTS)
    got = route(logits, TOP_K, config, replicas=replicas)
    free = dataclasses.replace(config, expert_capacity_factor=None, capacity_retries=0)
    plain = route(logits, TOP_K, free)
    np.testing.assert_array_equal(got.wanted_ids, plain.expert_ids)
    np.testing.assert_array_equal(got.scores, plain.scores)

    shape = jax.nn.sigmoid if config.score == "sigmoid" else jax.nn.softmax
    clean = np.where(np.all(logits == -np.inf, -1, keepdims=True), np.float32(0), logits)
    scores = np.asarray(jax.jit(shape)(clean))
    values = np.where(logits == -np.inf, -np.inf, clean if config.topk_first else scores)
    room = room_of(config.expert_capacity_factor, NUM_TOKENS * TOP_K, replicas.tolist())
    want = reference(plain.expert_ids, values, scores, room, config.capacity_retries)
    for token in range(NUM_TOKENS):
        ids = np.asarray(got.expert_ids[token])
        mine = ids[ids >= 0]
        assert sorted(mine.tolist()) == sorted(want[token])
        assert np.all(ids[len(mine) :] == -1)
        assert np.all(np.diff(values[token][mine]) <= 0)
        np.testing.assert_array_equal(got.weights[token][ids < 0], 0)
        if len(mine):
            share = scores[token][mine] / scores[token][mine].sum()
            np.testing.assert_allclose(
                got.weights[token][: len(mine)], config.scale * share, rtol=1e-5
            )


@pytest.mark.parametrize("retries", [0, 2])
def test_no_expert_takes_more_than_its_room(retries: int):
    """All tokens want the same two experts; with retries the next ones fill up as well."""
    logits = np.zeros((64, 8), np.float32) - np.arange(8, dtype=np.float32)
    logits += 0.01 * np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
    config = RouterConfig(expert_capacity_factor=1.0, capacity_retries=retries)
    routing = route(logits, 2, config)
    counts = routing_lib.count_tokens_per_expert(routing.expert_ids, 8)
    if retries:
        assert counts.tolist()[:4] == [16] * 4 and counts.max() == 16
    else:
        assert counts.tolist() == [16, 16] + [0] * 6
    assert routing_lib.count_tokens_per_expert(routing.wanted_ids, 8).tolist() == [64, 64] + [0] * 6


def test_room_for_all_changes_nothing():
    logits = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    config = RouterConfig(expert_capacity_factor=8.0, capacity_retries=1)
    for got, want in zip(route(logits, 3, config), route(logits, 3, RouterConfig()), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tokens", [(), (0,), (2, 0), (2, 3)])
def test_any_leading_dimensions(tokens: tuple[int, ...]):
    logits = np.random.default_rng(2).standard_normal((*tokens, 8)).astype(np.float32)
    config = RouterConfig(expert_capacity_factor=0.5, capacity_retries=1)
    got = route(logits, 3, config)
    flat = route(logits.reshape(-1, 8), 3, config)
    for a, b in zip(got, flat, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b).reshape(a.shape))


def test_broken_and_masked_tokens_take_no_room_from_others():
    logits = np.zeros((4, 4), np.float32)
    logits[:, 0] = [1.0, 2.0, np.nan, 9.0]
    mask = jnp.asarray([True, True, True, False])
    config = RouterConfig(expert_capacity_factor=1.0)  # room for one choice of an expert
    routing = route(logits, 1, config, mask=mask)
    assert routing.expert_ids[:, 0].tolist() == [-1, 0, -1, -1]
    assert np.all(np.isnan(routing.scores[2]))
    again = route(logits, 1, dataclasses.replace(config, capacity_retries=1), mask=mask)
    assert again.expert_ids[:, 0].tolist() == [1, 0, -1, -1]


def test_gradients_are_those_of_the_same_choice():
    """Also of tokens that are left without any expert, whose gradient is zero and not NaN."""
    logits = np.random.default_rng(3).standard_normal((16, 6)).astype(np.float32)
    config = RouterConfig(score="sigmoid", expert_capacity_factor=0.4, capacity_retries=1)
    ids = np.asarray(route(logits, 2, config).expert_ids)
    assert np.any(np.all(ids < 0, -1)) and np.any(np.sum(ids < 0, -1) == 1)
    wave = jnp.cos(jnp.arange(ids.size, dtype=jnp.float32)).reshape(ids.shape)

    def routed(logits: Any) -> Any:
        return jnp.sum(routing_lib.route(logits, 2, config).weights * wave)

    def formula(logits: Any) -> Any:
        scores = jnp.take_along_axis(jax.nn.sigmoid(logits), jnp.maximum(ids, 0), -1)
        scores = jnp.where(ids >= 0, scores, 0.0)
        total = jnp.maximum(scores.sum(-1, keepdims=True), 1e-9)
        return jnp.sum(scores / total * wave)

    got, want = (jax.jit(jax.grad(f))(logits) for f in (routed, formula))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_transformations_change_nothing():
    logits = np.random.default_rng(4).standard_normal((8, 16, 6)).astype(np.float32)
    config = RouterConfig(expert_capacity_factor=0.8, capacity_retries=2)

    def routed(logits: Any) -> Any:
        return routing_lib.route(logits, 2, config)

    want = [route(part, 2, config) for part in logits]  # devices bound their own tokens
    want = jax.tree.map(lambda *a: np.stack(a), *want)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(routed, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    for transformed in (jax.vmap(routed), sharded, jax.vmap(jax.checkpoint(routed))):
        for a, b in zip(jax.jit(transformed)(logits), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("num_experts", [10, None])
def test_layer_needs_no_larger_buffer(num_experts: int | None, retries: int):
    """Skewed routing: the group's buffers, of the size that the bound promises, drop nothing, and
    the statistics say what became of every choice.
    """
    config = dense.layer_config("eight_devices", T=12)
    experts = num_experts or config.E
    placement = None
    counts = np.ones(experts, np.int32)
    if num_experts:
        placement = random_placement(cases.make_rng("capacity"), experts, config.E)
        counts = placement.counts
    each = math.ceil(config.T * config.K / config.E)
    # A replica takes what its expert's others do not get: at worst all of it.
    most = config.R * each * (config.L if placement is None else int(counts.sum()))
    config = dataclasses.replace(config, capacity_factor=most / (config.T * config.K))
    router = RouterConfig(expert_capacity_factor=1.0, capacity_retries=retries)
    group = exchange.make_group(config, "cpu")
    moe = MoEConfig(group, dense.HIDDEN, router=router, num_experts=num_experts, observe_load=True)
    rng = cases.make_rng("capacity layer")
    params = {
        "router": rng.standard_normal((config.D, experts)).astype(np.float32) / 2,
        "gate": rng.standard_normal((config.E, config.D, dense.HIDDEN)).astype(np.float32),
        "up": rng.standard_normal((config.E, config.D, dense.HIDDEN)).astype(np.float32),
        "down": rng.standard_normal((config.E, dense.HIDDEN, config.D)).astype(np.float32),
    }
    params["router"][0] = -2 * np.log1p(np.arange(experts))
    x, mask = dense.make_tokens(config), dense.make_mask(config, "masked")
    _, stats = jax.jit(lambda *a: moe_layer(moe, *a[:2], mask=a[2], placement=placement))(
        params, x, mask
    )
    wanted, taken, rerouted = np.zeros(experts, int), np.zeros(experts, int), 0
    for tokens, real in zip(x, mask, strict=True):
        routing = route(
            jnp.asarray(tokens @ params["router"]),
            config.K,
            router,
            mask=jnp.asarray(real),
            replicas=None if placement is None else counts,
        )
        ids, asked = np.asarray(routing.expert_ids), np.asarray(routing.wanted_ids)
        taken += np.bincount(ids[ids >= 0], minlength=experts)
        wanted += np.bincount(asked[asked >= 0], minlength=experts)
        rerouted += sum(len(set(a) - set(b) - {-1}) for a, b in zip(ids, asked, strict=True))
    assert np.all(taken <= counts * config.R * each) and wanted.max() > config.R * each
    np.testing.assert_array_equal(stats.tokens_per_expert, wanted)
    np.testing.assert_array_equal(stats.load.tokens_per_expert, wanted)
    assert stats.num_dropped == 0
    assert stats.num_refused == wanted.sum() - taken.sum()
    assert retries or stats.num_refused > 0
    assert stats.num_rerouted == rerouted and (rerouted > 0) == (retries > 0)
    assert stats.rows_per_device.sum() == taken.sum()
    if placement is None:
        rows = taken.reshape(config.R, config.L).sum(-1)
        np.testing.assert_array_equal(stats.rows_per_device, rows)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            dict(expert_capacity_factor=0.0),
            r"expert_capacity_factor \(0.0\) must be finite and pos",
        ),
        (dict(expert_capacity_factor=math.nan), r"expert_capacity_factor \(nan\) must .* Use None"),
        (dict(capacity_retries=1), r"capacity_retries \(1\) must be at least 0, and 0 without exp"),
        (
            dict(expert_capacity_factor=1.0, capacity_retries=-1),
            r"capacity_retries \(-1\) must be at least 0",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=rf"^`RouterConfig`: {sentence}"):
        RouterConfig(**options)


def test_bad_replicas_and_merged_experts():
    logits, config = np.zeros((2, 8), np.float32), RouterConfig(expert_capacity_factor=1.0)
    ones = np.ones(8, np.int32)
    with pytest.raises(
        ValueError, match=r"^`route`: replicas are given, but the router has no exp"
    ):
        routing_lib.route(logits, 2, replicas=ones)
    with pytest.raises(ValueError, match=r"^`route`: replicas are int32\[7\]; wanted 8 integers"):
        routing_lib.route(logits, 2, config, replicas=ones[:7])
    with pytest.raises(ValueError, match=r"^`route`: replicas are float32\[8\]; wanted 8 integers"):
        routing_lib.route(logits, 2, config, replicas=ones.astype(np.float32))
    group = jaxmoe.ExpertParallel(num_experts=4, top_k=2, dim=4, max_tokens=4, dtype="float32")
    with pytest.raises(ValueError, match=r"^MoE: num_merged_experts works with no expert_capacity_"
                       r"factor \(1.0\)"):  # fmt: skip
        MoEConfig(group, 6, num_experts=8, num_merged_experts=4, router=config)
