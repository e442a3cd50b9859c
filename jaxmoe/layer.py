"""The MoE layer as a pure function of its parameters; `jaxmoe.nnx` and `jaxmoe.linen` wrap it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxmoe import losses, residuals
from jaxmoe.balance.choice import choose_replicas, locality_of, near_replicas, tie_replicas
from jaxmoe.balance.placement import Placement, check_placement
from jaxmoe.balance.statistics import Observation, observe
from jaxmoe.block_quantized import BlockQuantizedExperts
from jaxmoe.experts import swiglu, swiglu_experts
from jaxmoe.group import ExpertParallel
from jaxmoe.layer_config import MoEConfig, param_specs
from jaxmoe.layer_weights import EXPERTS, as_computed
from jaxmoe.ops import combine, dispatch
from jaxmoe.plan import Plan
from jaxmoe.products import batched, choose_backend, fp8_swiglu
from jaxmoe.quantized import QuantizedExperts
from jaxmoe.routing import Routing, count_tokens_per_expert, route
from jaxmoe.split import between, dispatch_done, dispatch_start

# Arrays, and `QuantizedExperts` or `BlockQuantizedExperts` for gate, up and down.
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEStats:
    """What a layer saw in one call, over all devices. Everything is a value; nothing is kept.

    Attributes:
      tokens_per_expert: [E] int32 choices of each expert, before any were refused or dropped.
      rows_per_device: [R] int32 rows that each device of the expert axis computed, over all slices
        of the mesh along it.
      num_dropped: [] int32 choices that found no room in a device's buffer (see `jaxmoe.dispatch`).
      num_refused: [] int32 choices that the router dropped, since no expert it could choose had
        room (`RouterConfig.expert_capacity_factor`).
      num_rerouted: [] int32 choices that went to another expert, for want of room in the first.
      entropy: [] float32 mean entropy of the router's scores, in nats; log(E) is uniform.
      load_balance_loss, z_loss, sequence_loss: [] float32, see `jaxmoe.losses`. Not added to
        anything: multiply with your coefficient and add to the loss.
      load: what `jaxmoe.balance.update` adds up, with `observe_load`; else None.
    """

    tokens_per_expert: Int32[Array, " E"]
    rows_per_device: Int32[Array, " R"]
    num_dropped: Int32[Array, ""]
    num_refused: Int32[Array, ""]
    num_rerouted: Int32[Array, ""]
    entropy: Float32[Array, ""]
    load_balance_loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    sequence_loss: Float32[Array, ""]
    load: Observation | None = None


def moe_layer(
    config: MoEConfig,
    params: Params,
    x: Float[Array, "*tokens D"],
    *,
    bias: Float32[Array, " E"] | None = None,
    mask: Bool[Array, "*tokens"] | None = None,
    key: jax.Array | None = None,
    placement: Placement | None = None,
    expert_map: Int32[Array, " E"] | None = None,
) -> tuple[Float[Array, "*tokens D"], MoEStats]:
    """`y = sum over chosen experts of weight * SwiGLU_e(x) + SwiGLU_shared(x)`.

    Outside `jax.shard_map`, `x` is a global array whose first dimension is a multiple of the token
    shards, and `params` are global; inside a `jax.shard_map` over the group's mesh both are this
    device's shards.

    Args:
      config: the static part.
      params: arrays as in `param_specs`; `gate`, `up` and `down` may be `QuantizedExperts` or
        `BlockQuantizedExperts` (`jaxmoe.compress.quantize_experts`), for the forward pass.
      x: [..., D] tokens; cast to `group.dtype`. With three or more dimensions the last but one is
        the sequence.
      bias: [E] selection bias of the router, or None.
      mask: [...] True for real tokens; the others go to no expert and get the shared experts'
        output only.
      key: for the router's jitter; None switches jitter off (evaluation).
      placement: which expert each row of `gate`, `up` and `down` is. Replicas of an expert must
        hold equal weights; they get equal gradients, the sum over all. Data, not part of the
        compiled program: another placement needs no other one. None: slot e holds expert e.
      expert_map: with `num_merged_experts`, which of those each of the router's experts is now
        (`MergedExperts.expert_map`); data, too. Choices of a token that come to the same expert
        travel as one, with the sum of their weights.

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
    _check_placed(config, placement)
    _check_map(config, expert_map)
    if x.size == 0:  # XLA's compilers fail on collectives of empty arrays
        return x, _no_stats(config)
    body = functools.partial(_local_layer, config)
    if group.mesh is None or _inside_shard_map(group):
        return body(params, x, bias, mask, key, placement, expert_map)
    return _sharded(config, body)(params, x, bias, mask, key, placement, expert_map)


def _check_placed(config: MoEConfig, placement: Placement | None) -> None:
    experts, slots = config.num_held_experts, config.group.num_experts
    if placement is not None:
        check_placement(placement, num_experts=experts, num_slots=slots, name="MoE placement")
    elif experts != slots:
        raise ValueError(
            f"MoE: {experts} experts share {slots} slots, but placement is None. Pass "
            "`jaxmoe.balance.contiguous(...)` at first, later what `place` made."
        )


def _check_map(config: MoEConfig, expert_map: Any) -> None:
    experts, merged = config.num_router_experts, config.num_merged_experts
    if merged is None and expert_map is None:
        return
    if merged is None:
        raise ValueError(
            "MoE: expert_map is given, but num_merged_experts is None. Set it to the experts that "
            "merging left."
        )
    if expert_map is None or expert_map.shape != (experts,):
        got = "None" if expert_map is None else f"of shape {list(expert_map.shape)}"
        raise ValueError(
            f"MoE: expert_map is {got}, wanted [{experts}] integers, which of the {merged} merged "
            "experts each of the router's is. Take it from `jaxmoe.compress.merge_experts`."
        )
    if isinstance(expert_map, jax.core.Tracer):
        return
    values = np.asarray(expert_map)
    if values.min() < 0 or values.max() >= merged:
        raise ValueError(
            f"MoE: expert_map holds {values.min()} to {values.max()}, wanted 0 to "
            f"{merged - 1}. It is of another merging; take the map that came with the weights."
        )


def _no_stats(config: MoEConfig) -> MoEStats:
    zero, experts = jnp.zeros((), jnp.float32), config.num_router_experts
    counts, none = jnp.zeros(experts, jnp.int32), jnp.zeros((), jnp.int32)
    rows = jnp.zeros(config.group.num_devices, jnp.int32)
    load = None
    if config.observe_load:
        devices, held = config.group.num_devices, config.num_held_experts
        shapes = ((held,), (held, held), (devices, devices))
        load = Observation(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
    return MoEStats(counts, rows, none, none, none, zero, zero, zero, zero, load)


def _inside_shard_map(group: ExpertParallel) -> bool:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return any(a in manual for a in group.axis)


def _sharded(config: MoEConfig, body: Any) -> Any:
    """`body` under `jax.shard_map` over the group's mesh."""
    group = config.group
    tokens = PartitionSpec(config.token_axes)
    specs = {name: PartitionSpec(*spec.sharding) for name, spec in param_specs(config).items()}

    def call(params: Params, x: Any, *rest: Any) -> Any:
        if x.shape[0] % config.num_token_shards:
            raise ValueError(
                f"MoE: the first dimension of x ({x.shape[0]}) must be a multiple of the "
                f"{config.num_token_shards} "
                f"devices of mesh axes {config.token_axes} that share the tokens. Pad the batch "
                f"and pass a mask."
            )
        whole = PartitionSpec()
        in_specs = ({k: specs[k] for k in params}, tokens, whole, tokens, whole, whole, whole)
        mapped = jax.shard_map(
            body,
            mesh=group.mesh,
            in_specs=in_specs,
            out_specs=(tokens, PartitionSpec()),
        )
        return mapped(*_reshard(group, (params, x, *rest), in_specs))

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
    config: MoEConfig,
    params: Params,
    x: Any,
    bias: Any,
    mask: Any,
    key: Any,
    placement: Placement | None,
    expert_map: Any,
) -> tuple[jax.Array, MoEStats]:
    """One device's part of the layer."""
    group = config.group
    routing = _route(config, params["router"], x, bias, mask, key, placement)
    ids = routing.expert_ids.reshape(-1, group.top_k)
    weights = routing.weights.reshape(-1, group.top_k)
    if expert_map is not None:
        ids, weights = _merged_choices(expert_map, ids, weights)
    slots = _slots(config, ids, placement)

    tokens = x.reshape(-1, group.dim).astype(group.dtype)
    experts = {name: params[name] for name in EXPERTS}
    if placement is not None:
        own = {name: w for name, w in experts.items() if name != "up" or not config.shared_up}
        experts |= tie_replicas(own, placement, _rank(group), group.axis)
    rest = {name: p for name, p in params.items() if name.startswith("shared")}
    weight = as_computed(config, experts | rest)
    shared = functools.partial(_shared_experts, weight)
    if config.overlap_shared and config.num_shared_experts:
        pending = dispatch_start(group, tokens, slots, weights, site=config.site)
        pending, shared_y = between(pending, shared, tokens)
        rows, row_weights, plan = dispatch_done(group, pending, site=config.site)
    else:
        rows, row_weights, plan = dispatch(group, tokens, slots, weights, site=config.site)
        shared_y = None
    rows, row_weights = checkpoint_name((rows, row_weights), residuals.ROWS)
    # A token chooses an expert once, so that one has no more rows than there are tokens.
    most = group.num_devices * tokens.shape[0]
    expert_rows = swiglu_experts(
        rows,
        plan.group_sizes,
        weight["gate"],
        weight["up"],
        weight["down"],
        block_rows=_block_rows(group, tokens.shape[0]),
        backend=_backend(config, most, weight),
        max_rows=most,
    )
    expert_rows = checkpoint_name(expert_rows.astype(group.dtype), residuals.EXPERT_ROWS)
    y = combine(group, expert_rows, row_weights, plan, site=config.site)
    if config.num_shared_experts:
        # Apart, or XLA makes it one product with the sum, which waits for the exchange.
        y = y + jax.lax.optimization_barrier(shared(tokens) if shared_y is None else shared_y)
    stats = _statistics(config, routing, ids, slots, plan)
    return y.reshape(x.shape).astype(x.dtype), stats


def _shared_experts(weight: Params, tokens: jax.Array) -> jax.Array:
    return swiglu(tokens, weight["shared_gate"], weight["shared_up"], weight["shared_down"])


def _route(
    config: MoEConfig,
    router: jax.Array,
    x: Any,
    bias: Any,
    mask: Any,
    key: Any,
    placement: Placement | None,
) -> Routing:
    group, options, locality = config.group, config.router, None
    if key is None:
        options = dataclasses.replace(options, jitter=0.0)
    elif group.mesh is not None:  # devices draw different noise for their different tokens
        key = jax.random.fold_in(key, jax.lax.axis_index(config.token_axes))
    if options.needs_locality:
        locality = locality_of(
            placement,
            _rank(group),
            num_experts=config.num_router_experts,
            num_devices=group.num_devices,
            devices_per_node=config.devices_per_node,
        )
    replicas = None
    if placement is not None and options.expert_capacity_factor is not None:
        replicas = placement.counts
    logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
    return route(
        logits,
        group.top_k,
        options,
        bias=bias,
        mask=mask,
        key=key,
        locality=locality,
        replicas=replicas,
    )


def _merged_choices(
    expert_map: Any, ids: Int32[Array, "T K"], weights: Float32[Array, "T K"]
) -> tuple[jax.Array, jax.Array]:
    """Choices of merged experts: the first of equal ones has their sum, the others are none."""
    zero = jnp.zeros((), ids.dtype)
    merged = jnp.where(ids >= 0, expert_map.astype(ids.dtype)[jnp.maximum(ids, zero)], ids)
    same = (merged[:, :, None] == merged[:, None, :]) & (merged >= 0)[:, :, None]
    place = jnp.arange(ids.shape[1])
    again = jnp.any(same & (place[None, :] < place[:, None]), -1)
    total = jnp.sum(jnp.where(same, weights[:, None, :], jnp.zeros((), weights.dtype)), -1)
    return jnp.where(again, zero - 1, merged), jnp.where(again, jnp.zeros_like(total), total)


def _slots(config: MoEConfig, ids: jax.Array, placement: Placement | None) -> jax.Array:
    """Where the choices [T, K] go."""
    if placement is None:
        return ids
    near = near_replicas(
        placement,
        _rank(config.group),
        num_devices=config.group.num_devices,
        devices_per_node=config.devices_per_node,
    )
    return choose_replicas(near, ids, exact=config.exact_replicas)


def _rank(group: ExpertParallel) -> jax.Array:
    """This device's index on the expert axis."""
    if group.mesh is None:
        return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(group.axis)


def _observe(config: MoEConfig, ids: jax.Array, slots: jax.Array) -> Observation | None:
    group = config.group
    if not config.observe_load:
        return None
    return observe(
        ids.reshape(slots.shape),
        slots,
        num_experts=config.num_held_experts,
        num_slots=group.num_experts,
        num_devices=group.num_devices,
        device=_rank(group),
        axis_name=config.token_axes or None,
    )


def _statistics(
    config: MoEConfig, routing: Routing, ids: jax.Array, slots: jax.Array, plan: Plan
) -> MoEStats:
    axes, wanted = config.token_axes or None, routing.wanted_ids
    routed = wanted[..., 0] >= 0
    counts = count_tokens_per_expert(wanted, config.num_router_experts)
    refused, rerouted = _for_want_of_room(routing)
    rows = jnp.zeros(config.group.num_devices, jnp.int32).at[_rank(config.group)].set(plan.num_rows)
    return MoEStats(
        tokens_per_expert=_sum(config, counts),
        rows_per_device=_sum(config, rows),
        num_dropped=_sum(config, plan.num_dropped),
        num_refused=_sum(config, refused),
        num_rerouted=_sum(config, rerouted),
        entropy=losses.router_entropy(routing.scores, axis_name=axes),
        load_balance_loss=losses.load_balance_loss(routing.scores, wanted, axis_name=axes),
        z_loss=losses.router_z_loss(routing.logits, mask=routed, axis_name=axes),
        sequence_loss=losses.sequence_balance_loss(routing.scores, wanted, axis_name=axes),
        load=_observe(config, ids if routing.expert_ids is wanted else wanted, slots),
    )


def _for_want_of_room(routing: Routing) -> tuple[jax.Array, jax.Array]:
    """How many choices were refused, and how many went to another expert."""
    ids, wanted = routing.expert_ids, routing.wanted_ids
    if ids is wanted:
        none = jnp.zeros_like(wanted, shape=())
        return none, none
    held = ids >= 0
    new = held & ~jnp.any(ids[..., :, None] == wanted[..., None, :], axis=-1)
    refused = jnp.sum(wanted >= 0, dtype=jnp.int32) - jnp.sum(held, dtype=jnp.int32)
    return refused, jnp.sum(new, dtype=jnp.int32)


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
    return min(2048, max(64, 1 << balanced.bit_length() >> 2))


def _platform(group: ExpertParallel) -> str:
    return jax.default_backend() if group.mesh is None else group.mesh.devices.flat[0].platform


def _backend(config: MoEConfig, max_rows: int, weights: Params) -> str:
    """The backend on the group's devices, which need not be JAX's default ones.

    max_rows: the most rows of an expert. With few, as in decoding, a GPU computes all experts at
    once rather than in a loop whose length the host has to ask for.
    """
    group, widths = config.group, (config.group.dim, config.hidden_dim)
    device = None if group.mesh is None else group.mesh.devices.flat[0]
    if isinstance(weights["gate"], BlockQuantizedExperts):
        dtype = group.dtype if group.rows_dtype is None else jnp.bfloat16
        return fp8_swiglu.choose_backend(config.backend, dtype, widths, device)
    chosen = choose_backend(config.backend, group.dtype, widths, device).backend
    if config.backend != "auto":
        return chosen
    quantized = any(isinstance(w, QuantizedExperts) for w in weights.values())
    if quantized or (config.shared_up and chosen == "cuda"):  # which only the loop takes
        chosen = "blocked"
    few = max_rows <= batched.MAX_ROWS and not quantized
    return "batched" if chosen == "blocked" and few and _platform(group) == "gpu" else chosen
