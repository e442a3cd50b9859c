"""The MoE layer as a dense computation: every expert runs on every token, on one device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import cases
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import spec
from cases import Config
from flax import nnx

import jaxmoe
from jaxmoe import losses
from jaxmoe.layer import MoEStats
from jaxmoe.routing import RouterConfig

HIDDEN = 6
# Weights of the losses in `objective`, large enough that their gradients show.
COEFFICIENTS = {"load_balance_loss": 0.3, "z_loss": 0.1, "sequence_loss": 0.2, "entropy": 0.1}
ROUTINGS = ("uniform", "zipf", "one_expert", "one_device", "empty_experts", "masked")


def layer_config(name: str, **changes: Any) -> Config:
    """A configuration of the table in float32."""
    return dataclasses.replace(cases.CONFIGS[name], **{"dtype": "float32", **changes})


def make_layer(config: Config, transport: str = "cpu", **options: Any) -> jaxmoe.MoE:
    group = exchange.make_group(config, transport)
    return jaxmoe.MoE(group, HIDDEN, rngs=nnx.Rngs(0), **options)


def abstract_layer(config: Config, transport: str = "cpu", **options: Any) -> jaxmoe.MoE:
    """The layer without values, which take seconds to draw."""
    return nnx.eval_shape(lambda: make_layer(config, transport, **options))


def make_params(state: nnx.State) -> dict[str, np.ndarray]:
    """Values for all variables of a layer's state, by name: normal with variance 1 / fan-in."""
    params = {}
    for path, variable in nnx.to_flat_state(state):
        shape = variable.shape
        value = cases.make_rng(path[-1]).standard_normal(shape) / math.sqrt(
            shape[max(-2, -len(shape))]
        )
        params[path[-1]] = value.astype(variable.dtype)
    return params


def with_params(state: nnx.State, params: dict[str, Any]) -> nnx.State:
    """The state with other parameters, by name."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(path, v.replace(params[path[-1]]) if path[-1] in params else v) for path, v in flat]
    )


def make_tokens(config: Config, name: object = 0) -> np.ndarray:
    """Global tokens [devices, T, D]; the first feature is one, for `skew`."""
    shape = (config.num_slices * config.R, config.T, config.D)
    x = cases.make_rng(f"{config}{name}").standard_normal(shape).astype(np.float32)
    x[..., 0] = 1.0
    return x


def skew(config: Config, router: Any, routing: str) -> Any:
    """A router [D, E] that routes in the manner of the pattern, by the first feature's weights."""
    expert = np.arange(config.E)
    push = {
        "zipf": -1.5 * np.log(1 + expert),
        "one_expert": 20.0 * (expert == config.E - 1),
        "one_device": 20.0 * (expert >= config.E - config.L),
        "empty_experts": -20.0 * (expert % 2),
    }.get(routing, np.zeros(config.E))
    return np.concatenate([push[None].astype(np.float32), np.asarray(router)[1:]])


def make_mask(config: Config, routing: str) -> np.ndarray:
    """True for real tokens; all of them but for "masked", where one device has none."""
    mask = np.ones((config.num_slices * config.R, config.T), bool)
    if routing == "masked":
        mask = cases.make_rng(config).random(mask.shape) < 0.6
        mask[-1] = False
    return mask


def kept(config: Config, ids: np.ndarray) -> np.ndarray:
    """Which choices of ids [devices, T, K] find a row, by the specification; [devices, T, K]."""
    by_slice = cases.slices_first(config, ids)
    result = np.zeros(by_slice.shape, bool)
    for s in range(config.num_slices):
        for d in range(config.R):
            for choice in spec.kept_choices(config, by_slice[s], d)[0]:
                result[(s, *choice)] = True
    return cases.devices_first(config, result)


def forward(
    config: Config,
    params: dict[str, Any],
    x: Any,
    mask: Any,
    router: RouterConfig | None = None,
    bias: Any = None,
    *,
    keep: Any,
) -> tuple[jax.Array, MoEStats]:
    """What `MoE` computes, from all tokens [devices, T, D]; `keep` is False for dropped choices."""
    router = router or RouterConfig()
    logits = x @ params["router"]
    routing = jaxmoe.route(logits, config.K, router, bias=bias, mask=mask)
    weights = jnp.where(keep, routing.weights, 0.0)
    chosen = jax.nn.one_hot(routing.expert_ids, config.E, dtype=jnp.float32)
    per_expert = jnp.einsum("ntke,ntk->nte", chosen, weights)
    hidden = jax.nn.silu(jnp.einsum("ntd,edf->ntef", x, params["gate"]))
    hidden *= jnp.einsum("ntd,edf->ntef", x, params["up"])
    y = jnp.einsum("ntef,efd,nte->ntd", hidden, params["down"], per_expert)
    if "shared_gate" in params:
        y += (jax.nn.silu(x @ params["shared_gate"]) * (x @ params["shared_up"])) @ params[
            "shared_down"
        ]
    none = jnp.zeros((), jnp.int32)
    rows = jnp.where(keep[..., None], chosen, 0.0).sum((0, 1, 2)).reshape(config.R, -1).sum(-1)
    stats = MoEStats(
        tokens_per_expert=jnp.sum(chosen, (0, 1, 2)).astype(jnp.int32),
        rows_per_device=rows.astype(jnp.int32),
        num_dropped=jnp.sum(mask[..., None] & ~keep, dtype=jnp.int32),
        num_refused=none,
        num_rerouted=none,
        entropy=losses.router_entropy(routing.scores),
        load_balance_loss=losses.load_balance_loss(routing.scores, routing.expert_ids),
        z_loss=losses.router_z_loss(routing.logits, mask=mask),
        sequence_loss=losses.sequence_balance_loss(routing.scores, routing.expert_ids),
    )
    return y, stats


def objective(y: jax.Array, stats: MoEStats) -> jax.Array:
    """A scalar whose gradient differs for every output, and that sees every loss."""
    wave = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    total = jnp.sum(y * wave)
    return total + sum(c * getattr(stats, name) for name, c in COEFFICIENTS.items())


def assert_close(got: Any, want: Any, tolerance: float, name: str = "") -> None:
    """All differences are within `tolerance` of the largest number, of the array as of its norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    if not want.size:
        return
    error = np.abs(got - want)
    assert error.max() <= tolerance * np.abs(want).max(), f"{name}: {error.max()}"
    norm = math.sqrt((want**2).sum())
    assert math.sqrt((error**2).sum()) <= tolerance * norm, name
