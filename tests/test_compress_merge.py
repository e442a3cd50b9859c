"""Merged experts: groups, exactness for equal ones, the layer against the dense one, errors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import dense
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import layer_config
from flax import nnx

import jaxmoe
from jaxmoe import balance, compress
from jaxmoe.experts import swiglu
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig
from jaxmoe.routing import RouterConfig

D, F = 6, 5
EXPERTS = ("gate", "up", "down")


def make_experts(num: int, name: str = "experts") -> dict[str, np.ndarray]:
    rng = cases.make_rng(name)
    shapes = {"gate": (num, D, F), "up": (num, D, F), "down": (num, F, D)}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def disguised(expert: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same function: hidden units in another order and of other signs."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(F)
    signs = rng.choice(np.array([-1, 1], np.float32), F)
    return {
        "gate": expert["gate"][:, order],
        "up": expert["up"][:, order] * signs,
        "down": expert["down"][order] * signs[:, None],
    }


def copies(of: list[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Originals, and experts of which the e-th is original of[e] in disguise."""
    originals = make_experts(max(of) + 1)
    parts = [disguised({k: w[i] for k, w in originals.items()}, e) for e, i in enumerate(of)]
    return originals, {k: np.stack([p[k] for p in parts]) for k in EXPERTS}


@pytest.mark.parametrize("wish", [dict(num_groups=3), dict(threshold=0.0)])
def test_equal_experts_merge_exactly(wish: dict[str, Any]):
    of = [1, 0, 1, 2, 0, 1, 2]
    _, experts = copies(of)
    counts = np.array([3, 1, 4, 1, 5, 9, 2])
    merged = compress.merge_experts(experts, counts=counts, **wish)
    np.testing.assert_array_equal(merged.expert_map, [0, 1, 0, 2, 1, 0, 2])
    assert (merged.num_experts, merged.num_merged) == (7, 3)
    np.testing.assert_array_equal(merged.merge_distances[:4], 0)
    assert (merged.merge_distances[4:] > 0.5).all()
    for name in EXPERTS:  # bit for bit the busiest of each group
        np.testing.assert_array_equal(merged.weights[name], experts[name][[5, 4, 6]])


def test_means_are_weighted_by_use_and_unused_experts_do_not_count():
    _, experts = copies([0, 0, 1, 1])
    experts["down"][0] *= 1 + np.float32(2.0**-4)
    merged = compress.merge_experts(experts, 2, counts=[1, 3, 0, 7])
    np.testing.assert_array_equal(merged.expert_map, [0, 0, 1, 1])
    # Expert 1 is the busiest: its units stay; expert 0 adds a quarter of its further 1 / 16.
    down = experts["down"][1].astype(np.float64) * (1 + 2.0**-6)
    np.testing.assert_allclose(merged.weights["down"][0], down, rtol=2e-7)
    np.testing.assert_array_equal(merged.weights["gate"][1], experts["gate"][3])
    # Nobody chose these: equal shares.
    even = compress.merge_experts(experts, 2, counts=[0, 0, 1, 1])
    factor = (2 + 2.0**-4) / 2 / (1 + 2.0**-4)
    np.testing.assert_allclose(even.weights["down"][0], experts["down"][0] * factor, rtol=2e-7)


def test_seldom_chosen_experts_merge_first():
    experts = make_experts(4)
    for name in EXPERTS:  # 0 and 1 are a little nearer than 2 and 3
        experts[name][1] = experts[name][0] * np.float32(1.10)
        experts[name][3] = experts[name][2] * np.float32(1.12)
    assert compress.merge_experts(experts, 3).expert_map.tolist() == [0, 0, 1, 2]
    busy = compress.merge_experts(experts, 3, counts=[100, 100, 1, 1])
    assert busy.expert_map.tolist() == [0, 1, 2, 2]


def test_outputs_on_tokens_decide_where_they_are_given():
    """Experts 0 and 1 differ in a feature that these tokens do not have."""
    experts = make_experts(3)
    for name in EXPERTS:
        experts[name][1] = experts[name][0]
        experts[name][2] = experts[name][0] * np.float32(1.01)
    experts["gate"][1, 0] += 50
    inputs = cases.make_rng("inputs").standard_normal((20, D)).astype(np.float32)
    inputs[:, 0] = 0
    assert compress.merge_experts(experts, 2).expert_map.tolist() == [0, 1, 0]
    assert compress.merge_experts(experts, 2, inputs=inputs).expert_map.tolist() == [0, 0, 1]


def test_output_distances_are_relative_root_mean_squares():
    experts = make_experts(2)
    inputs = cases.make_rng("inputs").standard_normal((20, D)).astype(np.float32)
    y = [
        np.asarray(swiglu(jnp.asarray(inputs), *(jnp.asarray(experts[n][e]) for n in EXPERTS)))
        for e in range(2)
    ]
    want = ((y[0] - y[1]) ** 2).sum() / np.mean([(a**2).sum() for a in y])
    got = compress.merge_experts(experts, 1, inputs=inputs).merge_distances
    np.testing.assert_allclose(got, [want**0.5], rtol=1e-5)


def test_threshold_keeps_a_multiple_for_the_devices():
    _, experts = copies([0, 1, 2, 0, 1, 2, 0, 0])
    assert compress.merge_experts(experts, threshold=0.0).num_merged == 3
    assert compress.merge_experts(experts, threshold=0.0, multiple_of=4).num_merged == 4
    assert compress.merge_experts(experts, threshold=99.0, multiple_of=2).num_merged == 2
    one = {name: w[:1] for name, w in experts.items()}
    np.testing.assert_array_equal(compress.merge_experts(one, 1).weights["up"], one["up"])


def merged_program(name: str) -> tuple[Any, Any, Any]:
    """A layer of twice as many router's experts as the group's slots; its program; its dense twin.

    The twin has all of the router's experts, in pairs of equal weights.
    """
    config = layer_config(name, capacity_factor=None)
    all_experts = dataclasses.replace(config, E=2 * config.E)
    moe = MoEConfig(
        exchange.make_group(config, "cpu"),
        dense.HIDDEN,
        num_experts=2 * config.E,
        num_merged_experts=config.E,
        observe_load=True,
    )
    state = nnx.state(dense.abstract_layer(all_experts))
    params = dense.make_params(state)

    def loss(params: Any, x: Any, mask: Any, expert_map: Any) -> Any:
        y, stats = moe_layer(moe, params, x, mask=mask, expert_map=expert_map)
        return dense.objective(y, stats), (y, stats)

    def twin(params: Any, x: Any, mask: Any, expert_map: Any) -> Any:
        own = {k: w[expert_map] if k in EXPERTS else w for k, w in params.items()}
        y, stats = dense.forward(all_experts, own, x, mask, keep=mask[..., None])
        return dense.objective(y, stats), (y, stats)

    run = [jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True)) for f in (loss, twin)]
    params |= {k: params[k][: config.E] for k in EXPERTS}
    return config, params, run


def test_layer_equals_one_with_the_merged_experts_written_out():
    """Output, statistics of the router and all gradients, where choices of a token coincide."""
    config, params, (layer, twin) = merged_program("data_expert")
    x, mask = dense.make_tokens(config), dense.make_mask(config, "masked")
    of = cases.make_rng("map").permutation(2 * config.E).astype(np.int32) % config.E
    args = [exchange.place(config, cases.slices_first(config, a)) for a in (x, mask)]
    (_, (y, stats)), grads = layer(params, *args, jnp.asarray(of))
    (_, (want_y, want_stats)), want = twin(params, x, mask, jnp.asarray(of))
    dense.assert_close(y, want_y, 1e-5, "y")
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        dense.assert_close(got, wanted, 1e-5)
    np.testing.assert_array_equal(stats.tokens_per_expert, want_stats.tokens_per_expert)
    for loss in dense.COEFFICIENTS:
        dense.assert_close(getattr(stats, loss), getattr(want_stats, loss), 1e-5, loss)
    # What placements are made of counts merged experts; choices that coincide count once.
    chosen = np.asarray(jaxmoe.route(jnp.asarray(x @ params["router"]), config.K, mask=mask)[0])
    ids = np.asarray(of)[chosen]
    loads = np.zeros(config.E)
    for row, used in zip(
        ids.reshape(-1, config.K), (chosen >= 0).reshape(-1, config.K), strict=True
    ):
        loads[sorted(set(row[used].tolist()))] += 1
    np.testing.assert_array_equal(stats.load.tokens_per_expert, loads)
    assert loads.sum() < (chosen >= 0).sum()


def test_merge_layer_changes_nothing_where_experts_are_equal():
    config = layer_config("data_expert", capacity_factor=None)
    graphdef, state = nnx.split(dense.abstract_layer(config, use_bias=True, num_shared_experts=1))
    params = dense.make_params(state)
    half = config.E // 2
    for key in EXPERTS:
        params[key][half:] = params[key][:half]
    moe = nnx.merge(graphdef, jax.tree.map(jnp.asarray, dense.with_params(state, params)))
    merged = compress.merge_experts(moe.expert_weights, half)
    small = compress.merge_layer(
        moe, merged, exchange.make_group(dataclasses.replace(config, E=half), "cpu")
    )
    x = exchange.place(config, cases.slices_first(config, dense.make_tokens(config)))
    call = nnx.jit(lambda moe, x: moe(x))
    (y, stats), (want, want_stats) = call(small, x), call(moe, x)
    dense.assert_close(y, want, 1e-6)
    np.testing.assert_array_equal(stats.tokens_per_expert, want_stats.tokens_per_expert)
    weights = (small.expert_weights, moe.expert_weights)
    assert compress.num_bytes(weights[0]) * 2 == compress.num_bytes(weights[1])
    eight_bits = compress.quantize_layer(small, "int8")  # and both together
    dense.assert_close(call(eight_bits, x)[0], want, 0.05)


def test_merged_experts_may_have_replicas():
    """Eight slots for the four that are left of twelve: nothing changes with their places."""
    config = layer_config("no_mesh", E=8, K=2)
    few = exchange.make_group(dataclasses.replace(config, E=4), "cpu")
    moe = layer_of_zeros(exchange.make_group(config, "cpu"), num_experts=12, num_merged_experts=4)
    assert moe.router.shape == (config.D, 12) and moe.placement.num_experts == 4
    params = dense.make_params(nnx.state(moe, nnx.Param))
    x = jnp.asarray(dense.make_tokens(config))
    of = jnp.asarray(cases.make_rng("of").permutation(12) % 4)

    @functools.partial(jax.jit, static_argnums=0)
    def run(layer: MoEConfig, params: Any, placement: Any) -> Any:
        return moe_layer(layer, params, x, placement=placement, expert_map=of)[0]

    alone = params | {k: params[k][:4] for k in EXPERTS}
    want = run(dataclasses.replace(moe.config, group=few), alone, None)
    for slots in ([0, 1, 2, 3, 0, 1, 2, 3], [3, 1, 1, 0, 2, 1, -1, 3]):
        placement = balance.placement_of(np.array(slots), 4)
        placed = params | {k: params[k][np.array(slots)] for k in EXPERTS}
        dense.assert_close(run(moe.config, placed, placement), want, 1e-6)


BAD_CALLS = [
    (dict(), r"num_groups is None and threshold None; wanted one of them"),
    (dict(num_groups=2, threshold=0.1), r"num_groups is 2 and threshold 0.1; wanted one of them"),
    (dict(num_groups=5), r"num_groups is 5, wanted 1 to 4, the experts there are"),
    (dict(num_groups=0), r"num_groups is 0, wanted 1 to 4"),
    (dict(threshold=-0.5), r"threshold is -0.5, wanted a finite number of at least 0"),
    (dict(threshold=float("nan")), r"threshold is nan, wanted a finite number"),
    (dict(threshold=0.1, multiple_of=3), r"multiple_of is 3, wanted a divisor of the 4 experts"),
    (dict(num_groups=2, counts=[1, 2]), r"counts are \[1.0, 2.0\]; wanted 4 numbers of at least"),
    (dict(num_groups=2, counts=[1, 2, 3, -1]), r"counts are .*Add up `MoEStats.tokens_per_expert`"),
    (dict(num_groups=2, counts=[0, 0, 0, 0]), r"counts are .*not all of them 0"),
    (dict(num_groups=2, counts=[1, np.nan, 0, 0]), r"counts are "),
    (dict(num_groups=2, inputs=np.zeros((3, 4))), r"inputs have shape \[3, 4\], wanted \[N, 6\]"),
    (dict(num_groups=2, inputs=np.full((3, D), np.inf)), r"inputs hold NaN or infinity"),
]


@pytest.mark.parametrize("options, sentence", BAD_CALLS)
def test_bad_calls(options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=r"^`merge_experts`: " + sentence):
        compress.merge_experts(make_experts(4), **options)


def test_bad_weights():
    experts = make_experts(4)
    with pytest.raises(ValueError, match=r"^`merge_experts`: params lack up, got gate, down. Pass"):
        compress.merge_experts({k: experts[k] for k in ("gate", "down")}, 2)
    with pytest.raises(
        ValueError, match=r"gate \[4, 6, 5\], up \[4, 5, 6\] and down \[4, 5, 6\] must"
    ):
        compress.merge_experts(experts | {"up": experts["down"]}, 2)
    experts["down"][1, 2, 3] = np.inf
    with pytest.raises(ValueError, match=r"^`merge_experts`: down holds NaN or infinity. Take a"):
        compress.merge_experts(experts, 2)


def layer_of_zeros(group: jaxmoe.ExpertParallel, **options: Any) -> jaxmoe.MoE:
    """To draw values takes seconds."""
    abstract = nnx.eval_shape(lambda: jaxmoe.MoE(group, F, **options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state))


def test_bad_layers():
    config = layer_config("no_mesh", K=2)
    group = exchange.make_group(config, "cpu")
    few = exchange.make_group(layer_config("no_mesh", E=3, K=2), "cpu")
    moe = layer_of_zeros(group)
    merged = compress.MergedExperts(
        {k: np.zeros((3, *w.shape[1:]), np.float32) for k, w in moe.expert_weights.items()},
        np.array([0, 1, 2, 0, 1], np.int32),
        np.zeros(4),
    )
    with pytest.raises(
        ValueError, match=r"^`merge_layer`: group has 5 experts on None; wanted 3 on"
    ):
        compress.merge_layer(moe, merged, group)
    short = dataclasses.replace(merged, expert_map=np.array([0, 1, 2], np.int32))
    with pytest.raises(ValueError, match=r"^`merge_layer`: merged are 3 experts of \[7, 5\], the "
                       r"layer has 5 of \[7, 5\]. Merge this"):  # fmt: skip
        compress.merge_layer(moe, short, few)
    spread = layer_of_zeros(group, num_experts=4)
    with pytest.raises(ValueError, match=r"^`merge_layer`: the layer has 5 slots for 4 experts"):
        compress.merge_layer(spread, merged, few)
    near = RouterConfig(device_penalty=0.1)
    for wrong in (dict(num_merged_experts=3), dict(num_experts=2, num_merged_experts=3)):
        with pytest.raises(
            ValueError, match=r"^MoE: num_merged_experts \(3\) must lie between 1 and"
        ):
            MoEConfig(few, F, **wrong)
    with pytest.raises(
        ValueError, match=r"^MoE: num_merged_experts \(4\) must lie between the gro"
    ):
        MoEConfig(few, F, num_experts=6, num_merged_experts=4)
    with pytest.raises(ValueError, match=r"^MoE: num_merged_experts works with no router option"):
        MoEConfig(few, F, num_experts=6, num_merged_experts=3, router=near)

    small = MoEConfig(few, F, num_experts=5, num_merged_experts=3)
    x = jnp.zeros((2, config.D), jnp.float32)
    with pytest.raises(
        ValueError, match=r"^MoE: expert_map is None, wanted \[5\] integers, which of"
    ):
        moe_layer(small, {}, x)
    with pytest.raises(ValueError, match=r"^MoE: expert_map is of shape \[3\], wanted \[5\]"):
        moe_layer(small, {}, x, expert_map=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"^MoE: expert_map holds 0 to 3, wanted 0 to 2. It is of"):
        moe_layer(small, {}, x, expert_map=jnp.array([0, 3, 1, 2, 2]))
    with pytest.raises(
        ValueError, match=r"^MoE: expert_map is given, but num_merged_experts is None"
    ):
        moe_layer(MoEConfig(few, F), {}, x, expert_map=jnp.zeros(3, jnp.int32))
