"""One up projection for all experts: the starting point, and the layer with its gradients."""

from __future__ import annotations

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
from test_compress_merge import EXPERTS, D, F, disguised, layer_of_zeros, make_experts

import jaxmoe
from jaxmoe import balance, compress
from jaxmoe.experts import swiglu_experts
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig, param_specs
from jaxmoe.linen import MoE as LinenMoE


def outputs(experts: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """[E, N, D] of every expert on every token, in float64."""
    e = {name: w.astype(np.float64) for name, w in experts.items()}
    a = x @ e["gate"]
    return (a / (1 + np.exp(-a)) * (x @ e["up"])) @ e["down"]


def test_experts_of_one_up_projection_stay_what_they_are():
    """In disguise: other orders, signs and lengths of the hidden units."""
    experts = make_experts(4)
    experts["up"][:] = experts["up"][0]
    parts = [disguised({k: w[e] for k, w in experts.items()}, e) for e in range(4)]
    hidden = {k: np.stack([part[k] for part in parts]) for k in EXPERTS}
    lengths = np.float32(2.0) ** cases.make_rng("lengths").integers(-1, 2, (4, F)).astype(
        np.float32
    )
    hidden["up"] = hidden["up"] * lengths[:, None, :]
    hidden["down"] = hidden["down"] / lengths[:, :, None]
    shared = compress.share_up(hidden, counts=[1, 2, 3, 4])
    assert {k: w.shape for k, w in shared.items()} == dict(
        gate=(4, D, F), up=(1, D, F), down=(4, F, D)
    )
    x = cases.make_rng("tokens").standard_normal((50, D))
    dense.assert_close(outputs(shared, x), outputs(hidden, x), 1e-6)


def test_the_mean_is_weighted_by_use():
    experts = make_experts(2)
    experts["up"][1] = experts["up"][0] + np.float32(0.1)
    up = compress.share_up(experts, counts=[3, 1])["up"][0]
    np.testing.assert_allclose(up, experts["up"][0] + 0.025, rtol=1e-5, atol=1e-6)
    # Each unit's `down` is multiplied by <u, m> / <m, m>.
    shared = compress.share_up(experts, counts=[3, 1])
    factor = (experts["up"] * up).sum(1) / (up**2).sum(0)
    np.testing.assert_allclose(shared["down"], experts["down"] * factor[:, :, None], rtol=1e-5)


def programs(name: str) -> tuple[Any, Any, Any]:
    config = layer_config(name)
    moe = MoEConfig(exchange.make_group(config, "cpu"), dense.HIDDEN, shared_up=True)
    params = dense.make_params(nnx.state(dense.abstract_layer(config)))
    params["up"] = params["up"][:1]

    def loss(params: Any, x: Any, mask: Any) -> Any:
        y, stats = moe_layer(moe, params, x, mask=mask)
        return dense.objective(y, stats), y

    def twin(params: Any, x: Any, mask: Any, keep: Any) -> Any:
        own = params | {"up": jnp.broadcast_to(params["up"], params["gate"].shape)}
        y, stats = dense.forward(config, own, x, mask, keep=keep)
        return dense.objective(y, stats), y

    run = [jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True)) for f in (loss, twin)]
    return config, params, run


def test_layer_equals_dense_and_gradients_are_summed():
    config, params, (layer, twin) = programs("data_expert")
    x, mask = dense.make_tokens(config), dense.make_mask(config, "masked")
    ids = jaxmoe.route(jnp.asarray(x @ params["router"]), config.K, mask=mask).expert_ids
    args = [exchange.place(config, cases.slices_first(config, a)) for a in (x, mask)]
    (_, y), grads = layer(params, *args)
    (_, want_y), want = twin(params, x, mask, dense.kept(config, np.asarray(ids)))
    dense.assert_close(y, want_y, 1e-5, "y")
    assert grads[0]["up"].shape == (1, config.D, dense.HIDDEN)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        dense.assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("backend", ["blocked", "ragged_dot"])
def test_backends_take_a_shared_matrix(backend: str):
    experts = {k: jnp.asarray(w) for k, w in make_experts(3).items()}
    rows = jnp.asarray(cases.make_rng("rows").standard_normal((20, D)).astype(np.float32))
    sizes = jnp.array([4, 0, 11], jnp.int32)

    @jax.jit
    def run(up: Any) -> Any:
        return swiglu_experts(rows, sizes, experts["gate"], up, experts["down"], backend=backend)

    up = experts["up"][0]
    want, pull = jax.vjp(run, jnp.broadcast_to(up, (3, D, F)))
    for shared in (up, up[None]):
        got, pull_shared = jax.vjp(run, shared)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        gradient = np.asarray(pull_shared(jnp.cos(want))[0]).reshape(D, F)
        np.testing.assert_allclose(
            gradient, np.asarray(pull(jnp.cos(want))[0]).sum(0), rtol=1e-5, atol=1e-5
        )
    assert np.abs(np.asarray(want)[:15]).min() > 0 and not np.asarray(want)[15:].any()


def test_layers_from_scratch_and_from_a_trained_one():
    config = layer_config("data_expert")
    group = exchange.make_group(config, "cpu")
    made = layer_of_zeros(group, shared_up=True)
    state = nnx.state(layer_of_zeros(group))
    trained = layer_of_zeros(group)
    nnx.update(trained, dense.with_params(state, dense.make_params(state)))
    shared = compress.share_layer(trained, counts=np.arange(config.E))
    for name, spec in param_specs(shared.config).items():
        assert getattr(shared, name).shape == spec.shape == getattr(made, name).shape
        assert getattr(shared, name).out_sharding == getattr(made, name).out_sharding
    want = compress.share_up(trained.expert_weights, np.arange(config.E))
    for name, weight in want.items():
        np.testing.assert_array_equal(shared.expert_weights[name], weight)
    saved = compress.num_bytes(trained.expert_weights) - compress.num_bytes(shared.expert_weights)
    assert saved == 4 * (config.E - 1) * config.D * F
    assert trained.gate.shape[-1] == F


def test_replicas_beside_a_shared_matrix():
    """It is no expert's own: the gradients of replicas are tied, its own is not."""
    config = layer_config("eight_devices", capacity_factor=None)
    moe = MoEConfig(
        exchange.make_group(config, "cpu"), dense.HIDDEN, shared_up=True, num_experts=10
    )
    specs = param_specs(moe)
    rng = cases.make_rng("replicas")
    params = {k: rng.standard_normal(s.shape).astype(np.float32) for k, s in specs.items()}
    start = balance.contiguous(10, config.E)
    x = exchange.place(config, cases.slices_first(config, dense.make_tokens(config)))

    @jax.jit
    def run(params: Any, placement: Any) -> Any:
        def loss(params: Any) -> Any:
            return dense.objective(*moe_layer(moe, params, x, placement=placement))

        return jax.grad(loss)(params)

    params |= {k: params[k][start.slot_experts] for k in ("gate", "down")}
    other = balance.placement_of(np.roll(start.slot_experts, 5), 10)
    moved = params | {k: np.roll(params[k], 5, 0) for k in ("gate", "down")}
    before, after = run(params, start), run(moved, other)
    dense.assert_close(after["up"], before["up"], 1e-5)
    dense.assert_close(after["gate"], np.roll(before["gate"], 5, 0), 1e-5)


def test_bad_input():
    experts = make_experts(3)
    with pytest.raises(
        ValueError, match=r"^`share_up`: counts are \[1.0\]; wanted 3 numbers of at"
    ):
        compress.share_up(experts, [1])
    with pytest.raises(
        ValueError, match=r"^`share_up`: params lack gate, up, down, got none. Pass"
    ):
        compress.share_up({})
    with pytest.raises(ValueError, match=r"^`share_up`: gate \[3, 6, 5\], up \[1, 6, 5\] and down"):
        compress.share_up(compress.share_up(experts))
    group = exchange.make_group(layer_config("no_mesh"), "cpu")
    with pytest.raises(ValueError, match=r"^`share_layer`: the layer has 5 slots for 4 experts"):
        compress.share_layer(layer_of_zeros(group, num_experts=4))
    small = compress.quantize_layer(layer_of_zeros(group), "int8")
    with pytest.raises(ValueError, match=r"^`share_layer`: the layer's weights are quantised. Do"):
        compress.share_layer(small)
    weights = [jnp.zeros(s) for s in ((3, D, F), (2, D, F), (3, F, D))]
    with pytest.raises(
        ValueError, match=r"up has shape \[2, 6, 5\], wanted \[3, 6, 5\] or \[1, 6, 5\]"
    ):
        swiglu_experts(jnp.zeros((4, D)), jnp.zeros(3, jnp.int32), *weights)


def test_linen_module_takes_both_options():
    group = exchange.make_group(layer_config("no_mesh", E=4, K=2), "cpu")
    module = LinenMoE(group, F, num_experts=9, num_merged_experts=4, shared_up=True)
    x = jax.ShapeDtypeStruct((6, group.dim), jnp.float32)
    of = jnp.arange(9, dtype=jnp.int32) % 4
    made = jax.eval_shape(
        lambda key, x: module.init_with_output(key, x, expert_map=of), jax.random.key(0), x
    )
    (_, stats), variables = made
    shapes = {name: a.shape for name, a in variables["params"].items()}
    dim = group.dim
    assert shapes == dict(router=(dim, 9), gate=(4, dim, F), up=(1, dim, F), down=(4, F, dim))
    assert stats.tokens_per_expert.shape == (9,)
