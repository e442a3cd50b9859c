"""`LoadStatistics`: which experts are busy, which go together, who sends to whom, over steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxmoe.balance.placement import slots_per_device
from jaxmoe.routing import count_tokens_per_expert

F32 = jnp.float32
AxisName = str | tuple[str, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """What one call of a layer routed, over all devices. Counts, exact up to 2^24.

    Attributes:
      tokens_per_expert: [E] choices of each expert, before any were dropped.
      together: [E, E] tokens that chose both experts; on the diagonal, tokens that chose the one.
      traffic: [R, R] tokens that source device s sends to destination d: one for each token and
        destination, however many of the token's experts are there. The diagonal stays at home.
    """

    tokens_per_expert: Float32[Array, "*layers E"]
    together: Float32[Array, "*layers E E"]
    traffic: Float32[Array, "*layers R R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoadStatistics:
    """Decayed sums of observations, for M layers. A pytree of float32 arrays: part of a checkpoint.

    After n updates `sums = sum_i decay^(n-i) observation_i` and `weight = sum_i decay^(n-i)`, so
    that `mean()` is an average without a bias towards the zeros of the beginning.

    Attributes:
      sums: an `Observation` with leading dimension M.
      weight: [M]
    """

    sums: Observation
    weight: Float32[Array, " M"]

    def mean(self) -> Observation:
        """The decayed average per update; 0 for a layer without one."""
        weight = jnp.where(self.weight > 0, self.weight, F32(1))

        def divide(a: Array) -> Array:
            return a / weight.reshape(-1, *(1,) * (a.ndim - 1))

        return jax.tree.map(divide, self.sums)


def no_statistics(num_layers: int, num_experts: int, num_devices: int) -> LoadStatistics:
    """Statistics before the first update.

    Args:
      num_layers: M, MoE layers.
      num_experts: E, experts that the router knows.
      num_devices: R, of the expert axis.
    """
    m, e, r = num_layers, num_experts, num_devices
    sums = Observation(jnp.zeros((m, e), F32), jnp.zeros((m, e, e), F32), jnp.zeros((m, r, r), F32))
    return LoadStatistics(sums, jnp.zeros(m, F32))


def update(
    stats: LoadStatistics,
    observed: Observation,
    *,
    decay: float | Array = 0.99,
    layer: int | Int32[Array, ""] | None = None,
) -> LoadStatistics:
    """The statistics after one more step. Pure, for use inside `jax.jit`.

    Args:
      stats: so far.
      observed: of all layers, stacked, with leading dimension M; with `layer`, of that one.
      decay: from 0 (only this step counts) to 1 (all steps count alike). 1 / (1 - decay) is about
        the number of steps that the average looks back on.
      layer: update this layer alone.

    Raises:
      ValueError: sizes that differ from those of the statistics.
    """
    want = jax.tree.map(lambda a: a.shape[1:] if layer is not None else a.shape, stats.sums)
    got = jax.tree.map(jnp.shape, observed)
    if want != got:
        raise ValueError(
            f"`update`: observed has shapes {vars(got)}; the statistics want {vars(want)}. Make "
            "them with `no_statistics` for this model and mesh."
        )
    decay = jnp.asarray(decay, F32)
    if layer is None:
        sums = jax.tree.map(lambda s, o: decay * s + o.astype(F32), stats.sums, observed)
        return LoadStatistics(sums, decay * stats.weight + 1)

    def one(s: Array, o: Array) -> Array:
        return s.at[layer].set(decay * s[layer] + o.astype(F32))

    weight = stats.weight.at[layer].set(decay * stats.weight[layer] + 1)
    return LoadStatistics(jax.tree.map(one, stats.sums, observed), weight)


def observe(
    expert_ids: Int32[Array, "*tokens K"],
    slots: Int32[Array, "*tokens K"] | None = None,
    *,
    num_experts: int,
    num_slots: int | None = None,
    num_devices: int = 1,
    device: int | Int32[Array, ""] = 0,
    axis_name: AxisName = None,
) -> Observation:
    """What this device's tokens chose; with `axis_name` summed over the devices of these axes.

    Args:
      expert_ids: [..., K] of this device's tokens; -1 and ids out of range count for nothing.
      slots: [..., K] the slots that the choices went to; None where slot e holds expert e.
      num_experts: E.
      num_slots: P; None for E.
      num_devices: R.
      device: this device's index on the expert axis.
      axis_name: mesh axes inside `jax.shard_map`, those over which tokens are sharded.
    """
    num_slots = num_experts if num_slots is None else num_slots
    width = slots_per_device(num_slots, num_devices, "observe")
    ids = expert_ids.reshape(-1, expert_ids.shape[-1])
    went = ids if slots is None else slots.reshape(ids.shape)
    valid = (ids >= 0) & (ids < num_experts)
    chosen = _members(jnp.where(valid, ids, -1), num_experts)
    reached = _members(jnp.where(valid, went // jnp.int32(width), -1), num_devices)
    sent = jnp.sum(reached, axis=0)
    observed = Observation(
        tokens_per_expert=count_tokens_per_expert(ids, num_experts).astype(F32),
        together=jnp.dot(chosen.T, chosen),
        traffic=jnp.zeros((num_devices, num_devices), F32).at[device].set(sent),
    )
    return observed if axis_name is None else lax.psum(observed, axis_name)


def _members(ids: Array, size: int) -> Array:
    """[N, size] float32: 1 for what is among a row's ids."""
    return jnp.any(ids[..., None] == jnp.arange(size, dtype=ids.dtype), axis=1).astype(F32)


def expert_load(stats: LoadStatistics) -> Any:
    """[M, E] decayed average of the tokens per expert: what `place` asks for, on the host."""
    return jax.device_get(stats.mean().tokens_per_expert)
