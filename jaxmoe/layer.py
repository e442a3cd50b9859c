"""The MoE layer as a pure function of its parameters; `jaxmoe.nnx` and `jaxmoe.linen` wrap it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxmoe import losses
from jaxmoe.experts import swiglu, swiglu_experts
from jaxmoe.group import ExpertParallel
from jaxmoe.ops import combine, dispatch
from jaxmoe.routing import RouterConfig, Routing, count_tokens_per_expert, route

Params = dict[str, jax.Array]
Initializer = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEStats:
    """What a layer saw in one call, over all devices. Everything is a value; nothing is kept.

    Attributes:
      tokens_per_expert: [E] int32 choices of each expert, before any were dropped.
      num_dropped: [] int32 choices that found no room (see `jaxmoe.dispatch`).
      entropy: [] float32 mean entropy of the router's scores, in nats; log(E) is uniform.
      load_balance_loss, z_loss, sequence_loss: [] float32, see `jaxmoe.losses`. Not added to
        anything: multiply with your coefficient and add to the loss.
    """

    tokens_per_expert: Int32[Array, " E"]
    num_dropped: Int32[Array, ""]
    entropy: Float32[Array, ""]
    load_balance_loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    sequence_loss: Float32[Array, ""]


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
    """

    group: ExpertParallel
    hidden_dim: int
    num_shared_experts: int = 0
    shared_hidden_dim: int | None = None
    router: RouterConfig = RouterConfig()
    token_axes: tuple[str, ...] | None = None
    site: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.group, ExpertParallel):
            raise ValueError(
                f"MoE: group must be an ExpertParallel, got {type(self.group).__name__}."
            )
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

    @property
    def num_token_shards(self) -> int:
        """Devices over which the tokens of a call are spread."""
        sizes = dict(self.group.spec.axis_sizes)
        return math.prod(sizes[a] for a in self.token_axes or ())


class ParamSpec(NamedTuple):
    """Shape, initialiser and sharding of one parameter."""

    shape: tuple[int, ...]
    init: Initializer
    sharding: tuple[Any, ...]


def param_specs(config: MoEConfig) -> dict[str, ParamSpec]:
    """The layer's parameters. Experts are sharded over the expert axis, the rest is replicated.

    Matrices are drawn from a truncated normal of variance 1 / fan-in (Le Cun 1998).
    """
    group, hidden = config.group, config.hidden_dim
    axis = None if group.mesh is None else group.axis if len(group.axis) > 1 else group.axis[0]
    one = jax.nn.initializers.lecun_normal()
    each = jax.nn.initializers.lecun_normal(batch_axis=(0,))
    experts, dim = group.num_experts, group.dim
    specs = {
        "router": ParamSpec((dim, experts), one, (None, None)),
        "gate": ParamSpec((experts, dim, hidden), each, (axis, None, None)),
        "up": ParamSpec((experts, dim, hidden), each, (axis, None, None)),
        "down": ParamSpec((experts, hidden, dim), each, (axis, None, None)),
    }
    if config.num_shared_experts:
        shared = config.num_shared_experts * (config.shared_hidden_dim or hidden)
        specs["shared_gate"] = ParamSpec((dim, shared), one, (None, None))
        specs["shared_up"] = ParamSpec((dim, shared), one, (None, None))
        specs["shared_down"] = ParamSpec((shared, dim), one, (None, None))
    return specs


def moe_layer(
    config: MoEConfig,
    params: Params,
    x: Float[Array, "*tokens D"],
    *,
    bias: Float32[Array, " E"] | None = None,
    mask: Bool[Array, "*tokens"] | None = None,
    key: jax.Array | None = None,
) -> tuple[Float[Array, "*tokens D"], MoEStats]:
    """`y = sum over chosen experts of weight * SwiGLU_e(x) + SwiGLU_shared(x)`.

    Outside `jax.shard_map`, `x` is a global array whose first dimension is a multiple of the token
    shards, and `params` are global; inside a `jax.shard_map` over the group's mesh both are this
    device's shards.

    Args:
      config: the static part.
      params: arrays as in `param_specs`.
      x: [..., D] tokens; cast to `group.dtype`. With three or more dimensions the last but one is
        the sequence.
      bias: [E] selection bias of the router, or None.
      mask: [...] True for real tokens; the others go to no expert and get the shared experts'
        output only.
      key: for the router's jitter; None switches jitter off (evaluation).

    Returns:
      y, shaped and typed like x; the statistics over all devices.
    """
    group = config.group
    if x.ndim < 2 or x.shape[-1] != group.dim:
        raise ValueError(
            f"MoE: x must have shape [..., {group.dim}] with at least two dimensions, got "
            f"{list(x.shape)}."
        )
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"MoE: mask must have shape {list(x.shape[:-1])}, got {list(mask.shape)}.")
    if x.size == 0:  # XLA's compilers fail on collectives of empty arrays
        return x, _no_stats(group)
    body = functools.partial(_local_layer, config)
    if group.mesh is None or _inside_shard_map(group):
        return body(params, x, bias, mask, key)
    return _sharded(config, body)(params, x, bias, mask, key)


def _no_stats(group: ExpertParallel) -> MoEStats:
    zero = jnp.zeros((), jnp.float32)
    counts = jnp.zeros(group.num_experts, jnp.int32)
    return MoEStats(counts, jnp.zeros((), jnp.int32), zero, zero, zero, zero)


def _inside_shard_map(group: ExpertParallel) -> bool:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return any(a in manual for a in group.axis)


def _sharded(config: MoEConfig, body: Any) -> Any:
    """`body` under `jax.shard_map` over the group's mesh."""
    group = config.group
    tokens = PartitionSpec(config.token_axes)
    specs = {name: PartitionSpec(*spec.sharding) for name, spec in param_specs(config).items()}

    def call(params: Params, x: Any, bias: Any, mask: Any, key: Any) -> Any:
        if x.shape[0] % config.num_token_shards:
            raise ValueError(
                f"MoE: the first dimension of x ({x.shape[0]}) must be a multiple of the "
                f"{config.num_token_shards} "
                f"devices of mesh axes {config.token_axes} that share the tokens. Pad the batch "
                f"and pass a mask."
            )
        in_specs = ({k: specs[k] for k in params}, tokens, PartitionSpec(), tokens, PartitionSpec())
        mapped = jax.shard_map(
            body,
            mesh=group.mesh,
            in_specs=in_specs,
            out_specs=(tokens, PartitionSpec()),
        )
        return mapped(*_reshard(group, (params, x, bias, mask, key), in_specs))

    return call


def _reshard(group: ExpertParallel, args: Any, specs: Any) -> Any:
    """Give arguments the sharding of shard_map's specs, which a mesh with Explicit axes demands."""
    mesh = group.mesh
    if mesh is None or jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return args

    def move(spec: PartitionSpec, part: Any) -> Any:
        to = jax.sharding.NamedSharding(mesh, spec)
        return jax.tree.map(lambda a: jax.sharding.reshard(a, to), part)

    return jax.tree.map(move, specs, args, is_leaf=lambda s: isinstance(s, PartitionSpec))


def _local_layer(
    config: MoEConfig, params: Params, x: Any, bias: Any, mask: Any, key: Any
) -> tuple[jax.Array, MoEStats]:
    """One device's part of the layer."""
    group, router = config.group, config.router
    if key is None:
        router = dataclasses.replace(router, jitter=0.0)
    elif group.mesh is not None:  # devices draw different noise for their different tokens
        key = jax.random.fold_in(key, jax.lax.axis_index(config.token_axes))

    logits = x.astype(jnp.float32) @ params["router"].astype(jnp.float32)
    routing = route(logits, group.top_k, router, bias=bias, mask=mask, key=key)
    stats = _statistics(config, routing)

    tokens = x.reshape(-1, group.dim).astype(group.dtype)
    weight = {name: p.astype(group.dtype) for name, p in params.items() if name != "router"}
    rows, row_weights, plan = dispatch(
        group,
        tokens,
        routing.expert_ids.reshape(-1, group.top_k),
        routing.weights.reshape(-1, group.top_k),
        site=config.site,
    )
    expert_rows = swiglu_experts(
        rows,
        plan.group_sizes,
        weight["gate"],
        weight["up"],
        weight["down"],
        block_rows=_block_rows(group, tokens.shape[0]),
    )
    y = combine(group, expert_rows, row_weights, plan, site=config.site)
    if config.num_shared_experts:
        y = y + swiglu(tokens, weight["shared_gate"], weight["shared_up"], weight["shared_down"])
    dropped = _sum(config, plan.num_dropped)
    return y.reshape(x.shape).astype(x.dtype), dataclasses.replace(stats, num_dropped=dropped)


def _statistics(config: MoEConfig, routing: Routing) -> MoEStats:
    axes = config.token_axes or None
    routed = routing.expert_ids[..., 0] >= 0
    counts = count_tokens_per_expert(routing.expert_ids, config.group.num_experts)
    return MoEStats(
        tokens_per_expert=_sum(config, counts),
        num_dropped=jnp.zeros((), jnp.int32),
        entropy=losses.router_entropy(routing.scores, axis_name=axes),
        load_balance_loss=losses.load_balance_loss(
            routing.scores, routing.expert_ids, axis_name=axes
        ),
        z_loss=losses.router_z_loss(routing.logits, mask=routed, axis_name=axes),
        sequence_loss=losses.sequence_balance_loss(
            routing.scores, routing.expert_ids, axis_name=axes
        ),
    )


def _sum(config: MoEConfig, a: jax.Array) -> jax.Array:
    return jax.lax.psum(a, config.token_axes) if config.token_axes else a


def _block_rows(group: ExpertParallel, num_tokens: int) -> int:
    """Rows of a step of the experts' loop, a power of two, by what one expert gets when balanced.

    On CPUs about that many, from 8 to 128. On GPUs about half as many, from 64 to 2048: each step
    launches kernels, and what an expert's last block lacks is wasted.
    """
    balanced = max(1, num_tokens * group.top_k // group.num_local_experts)
    if _platform(group) == "cpu":
        return min(128, max(8, 1 << (balanced - 1).bit_length()))
    return min(2048, max(64, 1 << (balanced // 2).bit_length() - 1))


def _platform(group: ExpertParallel) -> str:
    return jax.default_backend() if group.mesh is None else group.mesh.devices.flat[0].platform
