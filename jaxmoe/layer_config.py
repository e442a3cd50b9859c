"""A MoE layer's settings, and its parameters: their shapes, initialisers and shardings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.group import ExpertParallel
from jaxmoe.products import BACKENDS
from jaxmoe.routing import RouterConfig

Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The static part of a layer.

    Attributes:
      group: the devices, experts and sizes.
      hidden_dim: F, hidden width of an expert.
      num_shared_experts: experts that every token passes through, run as one of their joint width.
      shared_hidden_dim: hidden width of one shared expert; None means hidden_dim.
      router: how experts are chosen.
      token_axes: mesh axes over which tokens are sharded, the expert axes among them; None means
        all.
      site: name of the layer's exchanges, see `jaxmoe.dispatch`.
      num_experts: E, experts that the router knows; None for one per slot. The group's
        `num_experts` are the slots, of which a busy expert can have several (`jaxmoe.balance`).
      devices_per_node: consecutive devices of the expert axis that share a node, for the choice of
        replicas and the router's locality options; None: no nodes.
      exact_replicas: of `jaxmoe.balance.choose_replicas`.
      observe_load: count for `MoEStats.load`, which costs an [E, T] x [T, E] product.
      num_merged_experts: E', experts that are left of the router's E after merging
        (`jaxmoe.compress.merge_experts`); None: all. Slots hold these.
      shared_up: all experts have one up projection, `up` [1, D, F], replicated.
      overlap_shared: the shared experts run between the start and the done of dispatch
        (`jaxmoe.split`); which pays where the group splits its calls.
      backend: of the experts' products, as for `jaxmoe.grouped_matmul`.
      expert_dtype: float8_e4m3fn: each step quantises the experts' weights (`quantize_blocks`) and
        computes forward in FP8; gradients are those of the floats (`swiglu_experts`). None: in the
        group's dtype.
    """

    group: ExpertParallel
    hidden_dim: int
    num_shared_experts: int = 0
    shared_hidden_dim: int | None = None
    router: RouterConfig = RouterConfig()
    token_axes: tuple[str, ...] | None = None
    site: str | None = None
    num_experts: int | None = None
    devices_per_node: int | None = None
    exact_replicas: bool = False
    observe_load: bool = False
    num_merged_experts: int | None = None
    shared_up: bool = False
    overlap_shared: bool = False
    backend: str = "auto"
    expert_dtype: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.group, ExpertParallel):
            raise ValueError(
                f"MoE: group must be an ExpertParallel, got {type(self.group).__name__}."
            )
        if self.expert_dtype is not None:
            if jnp.dtype(self.expert_dtype) != jnp.float8_e4m3fn:
                raise ValueError(
                    f"MoE: expert_dtype must be float8_e4m3fn or None (as the group's dtype, "
                    f"{self.group.dtype.name}), got {jnp.dtype(self.expert_dtype).name}."
                )
            object.__setattr__(self, "expert_dtype", jnp.dtype(self.expert_dtype))
        if self.backend not in BACKENDS:
            raise ValueError(f"MoE: backend must be one of {BACKENDS}, got {self.backend!r}.")
        for name, least in (("hidden_dim", 1), ("num_shared_experts", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"MoE: {name} must be at least {least}, got {getattr(self, name)}."
                )
        names = [name for name, _ in self.group.spec.axis_sizes]
        axes = self.token_axes if self.token_axes is not None else tuple(names)
        unknown = [a for a in axes if a not in names]
        left_out = [a for a in self.group.axis if a not in axes]
        if unknown or left_out:
            raise ValueError(
                f"MoE: token_axes {axes} must be axes of the group's mesh {tuple(names)} and "
                f"include its "
                f"expert axis {self.group.axis}: every device routes its own tokens."
            )
        object.__setattr__(self, "token_axes", axes)
        _check_merging(self)
        _check_replication(self)

    @property
    def num_router_experts(self) -> int:
        """E: experts that the router knows."""
        return self.num_experts or self.group.num_experts

    @property
    def num_held_experts(self) -> int:
        """Experts with weights of their own: the router's, or those that merging left."""
        return self.num_merged_experts or self.num_router_experts

    @property
    def num_token_shards(self) -> int:
        """Devices over which the tokens of a call are spread."""
        sizes = dict(self.group.spec.axis_sizes)
        return math.prod(sizes[a] for a in self.token_axes or ())


def _check_merging(config: MoEConfig) -> None:
    merged, experts = config.num_merged_experts, config.num_router_experts
    if merged is None:
        return
    if config.num_experts is None or not 1 <= merged <= experts:
        raise ValueError(
            f"MoE: num_merged_experts ({merged}) must lie between 1 and num_experts "
            f"({config.num_experts}), the experts that the router knows. Set both."
        )
    if config.router.needs_locality:
        raise ValueError(
            "MoE: num_merged_experts works with no router option that looks at devices or nodes. "
            "Leave device_penalty, node_penalty, local_slack and num_nodes at their defaults."
        )
    if config.router.expert_capacity_factor is not None:
        raise ValueError(
            "MoE: num_merged_experts works with no expert_capacity_factor "
            f"({config.router.expert_capacity_factor}): it bounds the router's experts, which are "
            "not those that have rows. Leave it None, or bound the group by capacity_factor."
        )


def _check_replication(config: MoEConfig) -> None:
    group, experts = config.group, config.num_held_experts
    if not group.top_k <= experts <= group.num_experts:
        raise ValueError(
            f"MoE: {'num_experts' if config.num_merged_experts is None else 'num_merged_experts'} "
            f"({experts}) must lie between the group's top_k ({group.top_k}) and "
            f"its {group.num_experts} slots. Make the group with num_experts=the slots of all "
            "devices, at least one for each expert."
        )
    per_node, nodes = config.devices_per_node, config.router.num_nodes
    if per_node is not None and (per_node < 1 or group.num_devices % per_node):
        raise ValueError(
            f"MoE: devices_per_node ({per_node}) must divide the {group.num_devices} devices of "
            "the group. Leave it None where all devices are equally near."
        )
    if nodes > 1 and nodes != group.num_devices // (per_node or group.num_devices):
        raise ValueError(
            f"MoE: router.num_nodes ({nodes}) must be the {group.num_devices} devices of the group "
            f"by devices_per_node ({per_node}). Set devices_per_node."
        )


class ParamSpec(NamedTuple):
    """Shape, initialiser and sharding of one parameter."""

    shape: tuple[int, ...]
    init: Initializer
    sharding: tuple[Any, ...]


def param_specs(config: MoEConfig) -> dict[str, ParamSpec]:
    """The layer's parameters. Experts are sharded over the expert axis, the rest is replicated.

    With fewer experts than slots, slot p starts with expert p mod E (`jaxmoe.balance.contiguous`).

    Matrices are drawn from a truncated normal of variance 1 / fan-in (Le Cun 1998).
    """
    group, hidden = config.group, config.hidden_dim
    axis = None if group.mesh is None else group.axis if len(group.axis) > 1 else group.axis[0]
    lecun_normal = jax.nn.initializers.lecun_normal
    one = lecun_normal()
    each = _replicated(lecun_normal(batch_axis=(0,)), config)
    experts, dim = group.num_experts, group.dim
    up = ParamSpec((experts, dim, hidden), each, (axis, None, None))
    if config.shared_up:
        up = ParamSpec((1, dim, hidden), lecun_normal(batch_axis=(0,)), (None, None, None))
    specs = {
        "router": ParamSpec((dim, config.num_router_experts), one, (None, None)),
        "gate": ParamSpec((experts, dim, hidden), each, (axis, None, None)),
        "up": up,
        "down": ParamSpec((experts, hidden, dim), each, (axis, None, None)),
    }
    if config.num_shared_experts:
        shared = config.num_shared_experts * (config.shared_hidden_dim or hidden)
        specs["shared_gate"] = ParamSpec((dim, shared), one, (None, None))
        specs["shared_up"] = ParamSpec((dim, shared), one, (None, None))
        specs["shared_down"] = ParamSpec((shared, dim), one, (None, None))
    return specs


def _replicated(init: Initializer, config: MoEConfig) -> Initializer:
    """`init` for the experts, and further slots that repeat the first of them."""
    num_experts, num_slots = config.num_held_experts, config.group.num_experts
    if num_experts == num_slots:
        return init

    def repeated(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        drawn = init(key, (num_experts, *shape[1:]), dtype)
        return drawn[jnp.arange(num_slots) % num_experts]

    return repeated
