"""`jaxmoe.MoE`: the MoE layer as a Flax NNX module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxmoe.balance.placement import Placement, check_placement, contiguous
from jaxmoe.block_quantized import BlockQuantizedExperts
from jaxmoe.group import ExpertParallel
from jaxmoe.layer import MoEStats, moe_layer
from jaxmoe.layer_config import MoEConfig, param_specs
from jaxmoe.quantized import QuantizedExperts
from jaxmoe.routing import RouterConfig, update_bias


class RouterBias(nnx.Variable):
    """The router's selection bias: state that `MoE.update_bias` moves, not a trained parameter."""


class PlacementArray(nnx.Variable):
    """An array of the layer's `Placement`: state that `MoE.set_placement` changes, not trained."""


class ExpertMapArray(nnx.Variable):
    """Which merged expert each of the router's is (`jaxmoe.compress.merge_layer`), not trained."""


class QuantizedArray(nnx.Variable):
    """Eight-bit expert weights or their scales (`jaxmoe.compress.quantize_layer`), not trained."""


class BlockQuantizedArray(QuantizedArray):
    """As `QuantizedArray`, of `BlockQuantizedExperts`."""


class MoE(nnx.Module):
    """A Mixture-of-Experts layer: `y = sum_k weight_k SwiGLU_{e_k}(x) + SwiGLU_shared(x)`.

    Under `jax.jit` call it on global arrays; it runs its exchanges under a `jax.shard_map` of its
    own. Inside a `jax.shard_map` over the group's mesh, call it on the device's shards. Without a
    mesh it runs on one device.

    Parameters (E experts, D = group.dim, F = hidden_dim): `router` [D, E]; `gate`, `up` [E, D, F]
    and `down` [E, F, D], sharded over the expert axis; `shared_gate`, `shared_up`, `shared_down`
    with shared experts; `router_bias` [E] (a `RouterBias`) with `use_bias=True`. With
    `num_experts`, `gate`, `up` and `down` have a row for each of the group's slots instead, and
    `slot_experts`, `expert_slots` and `expert_counts` (`PlacementArray`s) say which expert it is.

    Args:
      group: devices, sizes, dtype of the computation and transport; share it among layers.
      hidden_dim: F, hidden width of an expert.
      num_shared_experts: experts that every token passes through.
      shared_hidden_dim: hidden width of one of these; None means hidden_dim.
      router: how experts are chosen (`RouterConfig`).
      use_bias: give the router a selection bias for balancing without an auxiliary loss
        (DeepSeek-V3).
      param_dtype: dtype of the parameters; they are cast to `group.dtype` for the computation.
      token_axes: mesh axes over which tokens are sharded; None means all axes of the mesh.
      num_experts: E, experts that the router knows, where busy ones are to have replicas; the
        group's `num_experts` are then the slots of all devices (see `jaxmoe.balance`). None: the
        group's, each in the slot of its number for good.
      devices_per_node, exact_replicas, observe_load: see `jaxmoe.layer_config.MoEConfig`.
      num_merged_experts: E', experts that are left of `num_experts` after merging; the slots hold
        these, and `expert_map` (an `ExpertMapArray`) says which each of the router's is now.
        `jaxmoe.compress.merge_layer` makes such a layer of a trained one.
      shared_up: all experts have one up projection: `up` is [1, D, F] and replicated, its gradient
        the sum over the experts.
      overlap_shared: run the shared experts between sending and receiving of dispatch; see
        `jaxmoe.split` for where that pays.
      backend: of the experts' products, as for `jaxmoe.grouped_matmul`.
      expert_dtype: jnp.float8_e4m3fn quantises the experts' weights in each step and computes them
        forward in FP8; parameters and gradients stay floats. None: in `group.dtype`.
      rngs: for the initial values (stream "params").
    """

    def __init__(
        self,
        group: ExpertParallel,
        hidden_dim: int,
        *,
        num_shared_experts: int = 0,
        shared_hidden_dim: int | None = None,
        router: RouterConfig | None = None,
        use_bias: bool = False,
        param_dtype: Any = jnp.float32,
        token_axes: tuple[str, ...] | None = None,
        num_experts: int | None = None,
        devices_per_node: int | None = None,
        exact_replicas: bool = False,
        observe_load: bool = False,
        num_merged_experts: int | None = None,
        shared_up: bool = False,
        overlap_shared: bool = False,
        backend: str = "auto",
        expert_dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.config = MoEConfig(
            group,
            hidden_dim,
            num_shared_experts,
            shared_hidden_dim,
            router or RouterConfig(),
            token_axes,
            site=f"MoE {next(group.layer_numbers)}",
            num_experts=num_experts,
            devices_per_node=devices_per_node,
            exact_replicas=exact_replicas,
            observe_load=observe_load,
            num_merged_experts=num_merged_experts,
            shared_up=shared_up,
            overlap_shared=overlap_shared,
            backend=backend,
            expert_dtype=expert_dtype,
        )
        for name, spec in param_specs(self.config).items():
            value = spec.init(rngs.params(), spec.shape, param_dtype)
            setattr(self, name, nnx.Param(value, **_metadata(group, spec.sharding)))
        # The scales of quantised weights; `jaxmoe.compress.quantize_layer` sets them.
        self.gate_scales: QuantizedArray | None = None
        self.up_scales: QuantizedArray | None = None
        self.down_scales: QuantizedArray | None = None
        bias = jnp.zeros(self.config.num_router_experts, jnp.float32)
        self.router_bias = RouterBias(bias, **_metadata(group, (None,))) if use_bias else None
        arrays: dict[str, Any] = dict.fromkeys(("slot_experts", "expert_slots", "expert_counts"))
        held = self.config.num_held_experts
        if num_experts is not None and (num_merged_experts is None or held < group.num_experts):
            placement = contiguous(held, group.num_experts)
            for name, array in _named(placement).items():
                metadata = _metadata(group, (None,) * array.ndim)
                arrays[name] = PlacementArray(jnp.asarray(array), **metadata)
        self.slot_experts = arrays["slot_experts"]
        self.expert_slots = arrays["expert_slots"]
        self.expert_counts = arrays["expert_counts"]
        of = jnp.arange(self.config.num_router_experts, dtype=jnp.int32) % held
        self.expert_map = (
            None if num_merged_experts is None else ExpertMapArray(of, **_metadata(group, (None,)))
        )

    @property
    def expert_weights(self) -> dict[str, Any]:
        """`gate`, `up` and `down`: arrays, or of a quantised layer `QuantizedExperts` or
        `BlockQuantizedExperts`.
        """
        return {name: self._param(name) for name in ("gate", "up", "down")}

    @property
    def placement(self) -> Placement | None:
        """Which expert lies in which slot; None without `num_experts`."""
        if self.slot_experts is None or self.expert_slots is None or self.expert_counts is None:
            return None
        return Placement(self.slot_experts[...], self.expert_slots[...], self.expert_counts[...])

    def set_placement(self, placement: Placement) -> None:
        """Take over a placement. The weights must lie accordingly: move them with `migrate`.

        Raises:
          ValueError: a placement of another model or number of devices, or with another M than the
            layer's, which would need another program.
        """
        old = self.placement
        if old is None:
            raise ValueError(
                "MoE.set_placement: this layer has no placement. Make it with num_experts=..., and "
                "the group with as many experts as slots."
            )
        check_placement(
            placement,
            num_experts=old.num_experts,
            num_slots=old.num_slots,
            name="MoE.set_placement",
        )
        if placement.max_replicas != old.max_replicas:
            raise ValueError(
                f"MoE.set_placement: the placement has room for {placement.max_replicas} replicas "
                f"of an expert, the layer's for {old.max_replicas}. Make it without max_replicas."
            )
        for name, array in _named(placement).items():
            getattr(self, name)[...] = jnp.asarray(array)

    def __call__(
        self,
        x: Float[Array, "*tokens D"],
        *,
        mask: Bool[Array, "*tokens"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "*tokens D"], MoEStats]:
        """The layer's output, shaped and typed like `x`, and its statistics.

        Args:
          x: [..., D]; the first dimension is a multiple of the devices that share the tokens. With
            three or more dimensions the last but one is the sequence (for `sequence_loss`).
          mask: [...] True for real tokens. The others get the shared experts' output only.
          key: for the router's jitter; None switches it off.
        """
        params = {name: self._param(name) for name in param_specs(self.config)}
        bias = None if self.router_bias is None else self.router_bias[...]
        expert_map = None if self.expert_map is None else self.expert_map[...]
        return moe_layer(
            self.config,
            params,
            x,
            bias=bias,
            mask=mask,
            key=key,
            placement=self.placement,
            expert_map=expert_map,
        )

    def _param(self, name: str) -> Any:
        variable, scales = getattr(self, name), getattr(self, f"{name}_scales", None)
        if scales is None:
            return variable[...]
        blocks = isinstance(variable, BlockQuantizedArray)
        kind = BlockQuantizedExperts if blocks else QuantizedExperts
        return kind(variable[...], scales[...])

    def update_bias(self, stats: MoEStats, rate: float) -> None:
        """Move the selection bias against the load seen in `stats` (see `jaxmoe.update_bias`)."""
        if self.router_bias is None:
            raise ValueError("MoE.update_bias: this layer has no bias. Make it with use_bias=True.")
        self.router_bias[...] = update_bias(self.router_bias[...], stats.tokens_per_expert, rate)


def _metadata(group: ExpertParallel, sharding: tuple[Any, ...]) -> dict[str, Any]:
    return {} if group.mesh is None else {"out_sharding": sharding, "mesh": group.mesh}


def _named(placement: Placement) -> dict[str, Any]:
    """The arrays of a placement by the names of the layer's variables."""
    return {
        "slot_experts": placement.slot_experts,
        "expert_slots": placement.expert_slots,
        "expert_counts": placement.counts,
    }
