"""The MoE layer as a Flax Linen module, over the same functions as `jaxmoe.MoE`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int32

from jaxmoe.balance.placement import Placement
from jaxmoe.group import ExpertParallel
from jaxmoe.layer import MoEStats, moe_layer
from jaxmoe.layer_config import MoEConfig, param_specs
from jaxmoe.routing import RouterConfig


class MoE(nn.Module):
    """A Mixture-of-Experts layer for Linen; see `jaxmoe.MoE` for what it computes and its options.

    Parameters are in the collection "params", boxed with their partitioning over the expert axis
    when the group has a mesh. With `use_bias=True` the selection bias is "bias" in the collection
    "router"; update it with `jaxmoe.update_bias` between steps.
    """

    group: ExpertParallel
    hidden_dim: int
    num_shared_experts: int = 0
    shared_hidden_dim: int | None = None
    router: RouterConfig = RouterConfig()
    use_bias: bool = False
    param_dtype: Any = jnp.float32
    token_axes: tuple[str, ...] | None = None
    num_experts: int | None = None
    devices_per_node: int | None = None
    exact_replicas: bool = False
    observe_load: bool = False
    num_merged_experts: int | None = None
    shared_up: bool = False
    overlap_shared: bool = False
    backend: str = "auto"
    expert_dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*tokens D"],
        *,
        mask: Bool[Array, "*tokens"] | None = None,
        key: jax.Array | None = None,
        placement: Placement | None = None,
        expert_map: Int32[Array, " E"] | None = None,
    ) -> tuple[Float[Array, "*tokens D"], MoEStats]:
        """The layer's output, shaped and typed like `x`, and its statistics.

        With `num_experts`, `placement` says which expert lies in which slot; keep it beside the
        parameters (`jaxmoe.balance.contiguous` to begin with). With `num_merged_experts`,
        `expert_map` is that of `jaxmoe.compress.merge_experts`, whose weights are the parameters.
        """
        config = MoEConfig(
            self.group,
            self.hidden_dim,
            self.num_shared_experts,
            self.shared_hidden_dim,
            self.router,
            self.token_axes,
            site="/".join(self.path),
            num_experts=self.num_experts,
            devices_per_node=self.devices_per_node,
            exact_replicas=self.exact_replicas,
            observe_load=self.observe_load,
            num_merged_experts=self.num_merged_experts,
            shared_up=self.shared_up,
            overlap_shared=self.overlap_shared,
            backend=self.backend,
            expert_dtype=self.expert_dtype,
        )
        params = {}
        for name, spec in param_specs(config).items():
            init: Any = spec.init
            if self.group.mesh is not None:
                init = nn.with_partitioning(init, spec.sharding, mesh=self.group.mesh)
            params[name] = self.param(name, init, spec.shape, self.param_dtype)
        bias = None
        if self.use_bias:
            zeros = jnp.zeros(config.num_router_experts, jnp.float32)
            bias = self.variable("router", "bias", lambda: zeros).value
        return moe_layer(
            config,
            params,
            x,
            bias=bias,
            mask=mask,
            key=key,
            placement=placement,
            expert_map=expert_map,
        )
