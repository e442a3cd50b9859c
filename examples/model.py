"""The example's language model: a small decoder-only transformer in the manner of DeepSeek-V3."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

import jaxmoe
from attention import Attention, KVCache, RMSNorm
from jaxmoe import compress
from latent_attention import LatentAttention, LatentCache
from linear import Linear, SwiGLU
from presets import ModelConfig, SettingsError


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and matmuls; parameters are float32 whatever it is.

    auto is bfloat16 on accelerators and float32 on a CPU. XLA's CPU backend gained nothing from
    bfloat16 on a 2-core Xeon with AMX: a [4096, 256] x [256, 1024] matmul ran at 251 GFLOP/s in
    float32 and 201 in bfloat16 (jax 0.10.2); jax 0.12 reached 936 there, but 168 in the backward
    pass (204 in float32), and elementwise work took three times as long.
    """
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def make_group(
    config: ModelConfig, mesh: Mesh | None, *, max_tokens: int, transport: str = "auto"
) -> jaxmoe.ExpertParallel:
    """The expert-parallel group that all layers of a model share.

    max_tokens: the most tokens per device in one call of the model.
    """
    if mesh is not None:
        _check_slots(config, mesh.shape["expert"])
    try:
        return jaxmoe.ExpertParallel(
            mesh,
            axis="expert",
            num_experts=config.num_slots,
            top_k=config.top_k,
            dim=config.dim,
            max_tokens=max_tokens,
            capacity_factor=config.capacity_factor,
            dtype=compute_dtype(config),
            wire_dtype=jnp.float8_e4m3fn if config.fp8_wire else None,
            transport=transport,
        )
    except (ValueError, RuntimeError) as error:
        raise SettingsError(str(error)) from error


def _check_slots(config: ModelConfig, num_devices: int) -> None:
    """Raises SettingsError for slots that the devices of the expert axis cannot share evenly."""
    left = config.num_slots % num_devices
    if not left:
        return
    if config.redundant_experts is None:
        raise SettingsError(
            f"model: num_experts ({config.num_experts}) must be divisible by the {num_devices} "
            "devices of the expert axis. Change --model.num-experts, --devices or --data-parallel."
        )
    raise SettingsError(
        f"model: num_experts + redundant_experts ({config.num_experts} + "
        f"{config.redundant_experts}) must be divisible by the {num_devices} devices of the expert "
        f"axis. Train with --model.redundant-experts "
        f"{config.redundant_experts + num_devices - left}, or change --devices or --data-parallel."
    )


def token_sharding(mesh: Mesh) -> NamedSharding:
    """Batch rows lie on all devices: those of the expert axis hold different tokens, too."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _moe(
    config: ModelConfig, group: jaxmoe.ExpertParallel, observe_load: bool, rngs: nnx.Rngs
) -> jaxmoe.MoE:
    return jaxmoe.MoE(
        group,
        config.expert_hidden_dim,
        num_shared_experts=config.num_shared_experts,
        router=jaxmoe.RouterConfig(
            score=config.score,
            normalize=True,
            scale=config.routed_scale,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            jitter=config.jitter,
            device_penalty=config.device_penalty,
            node_penalty=config.node_penalty,
            local_slack=config.local_slack,
            num_nodes=config.num_nodes,
            top_nodes=config.top_nodes,
            expert_capacity_factor=config.expert_capacity_factor,
            capacity_retries=config.capacity_retries,
        ),
        devices_per_node=_devices_per_node(config, group),
        use_bias=True,
        # Without replicas or moves the layer needs no placement.
        num_experts=None if config.redundant_experts is None else config.num_experts,
        observe_load=observe_load,
        rngs=rngs,
    )


def _devices_per_node(config: ModelConfig, group: jaxmoe.ExpertParallel) -> int | None:
    if config.num_nodes == 1:
        return None
    if group.num_devices % config.num_nodes:
        raise SettingsError(
            f"model: num_nodes ({config.num_nodes}) must divide the {group.num_devices} devices of "
            "the expert axis. Change --model.num-nodes, --devices or --data-parallel."
        )
    return group.num_devices // config.num_nodes


Cache = KVCache | LatentCache


class Block(nnx.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)), dense or a mixture of experts."""

    def __init__(
        self,
        config: ModelConfig,
        group: jaxmoe.ExpertParallel | None,
        *,
        dtype: jnp.dtype,
        observe_load: bool,
        rngs: nnx.Rngs,
    ) -> None:
        """group: None for a dense layer."""
        self.attention_norm = RMSNorm(config.dim)
        kind = Attention if config.attention == "grouped" else LatentAttention
        self.attention = kind(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.dim)
        self.dense = SwiGLU(config, dtype=dtype, rngs=rngs) if group is None else None
        self.moe = None if group is None else _moe(config, group, observe_load, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int32[Array, "B S"],
        cache: Cache | None,
        mask: Bool[Array, "B S"] | None,
        key: jax.Array | None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B S D"], Cache | None, jaxmoe.MoEStats | None]:
        y, cache = self.attention(self.attention_norm(x), positions, cache, fresh=fresh)
        x = x + y
        y = self.feed_forward_norm(x)
        if self.moe is not None:
            y, stats = self.moe(y, mask=mask, key=key)
            return x + y, cache, stats
        assert self.dense is not None
        return x + self.dense(y), cache, None


class Output(NamedTuple):
    """What a model call returns."""

    logits: Float[Array, "B S V"]
    """float32"""
    stats: jaxmoe.MoEStats
    """Load and losses, stacked over the MoE layers: each field has them as its first dimension."""
    caches: tuple[Cache, ...]
    """One per layer; none in a call without caches."""


class Transformer(nnx.Module):
    """Token ids to next-token logits, in training (no cache) and in decoding (with caches)."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        group: jaxmoe.ExpertParallel,
        *,
        observe_load: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """observe_load: count who goes where, for `Output.stats.load`."""
        self.config = config
        self.mesh = group.mesh
        dtype = self.dtype = group.dtype
        init = nnx.initializers.normal(config.init_std)
        self.embed = nnx.Embed(vocab_size, config.dim, embedding_init=init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(
                    config,
                    group if i >= config.num_dense_layers else None,
                    dtype=dtype,
                    observe_load=observe_load,
                    rngs=rngs,
                )
                for i in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(config.dim)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(config.dim, vocab_size, std=config.init_std, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int32[Array, "B S"],
        *,
        positions: Int32[Array, "B S"] | None = None,
        caches: tuple[Cache, ...] | None = None,
        fresh: bool = False,
        mask: Bool[Array, "B S"] | None = None,
        last: Int32[Array, " B"] | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Logits of the token after each of `tokens`.

        positions: of the tokens in their rows; None: 0, 1, ..., S - 1. Along S they grow by one.
        caches: of earlier positions, one per layer as `empty_caches` makes them; the new ones come
          back.
        fresh: the caches are empty and `positions` is None: tokens see these tokens alone.
        mask: False for tokens that the experts must leave out (padding); their logits mean nothing.
        last: of each row the only token whose logits are wanted, of [B, 1, V]; None: all.
        key: for the router's jitter; None where there is none, that is everywhere but in training.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = self.embed(tokens)
        if self.mesh is not None:
            x = jax.lax.with_sharding_constraint(x, token_sharding(self.mesh))
        # A cached call has no backward pass to save memory for.
        remat = self.config.remat and caches is None
        new_caches: list[Cache] = []
        stats: list[jaxmoe.MoEStats] = []
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            layer_key = None if key is None else jax.random.fold_in(key, i)
            call = jax.checkpoint(block) if remat else functools.partial(block, fresh=fresh)
            x, cache, layer_stats = call(x, positions, cache, mask, layer_key)
            if cache is not None:
                new_caches.append(cache)
            if layer_stats is not None:
                stats.append(layer_stats)
        if last is not None:
            x = jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None, None], axis=1)
        return Output(
            self._logits(self.norm(x)),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats),
            tuple(new_caches),
        )

    def empty_caches(self, batch_size: int, length: int) -> tuple[Cache, ...]:
        """Caches of `length` free slots for each of `batch_size` rows, one per layer."""
        return tuple(block.attention.empty_cache(batch_size, length) for block in self.blocks)

    def _logits(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        kernel = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        # Flat for the same reason as in `Linear`; summed and kept in float32 for the softmax.
        logits = jnp.dot(
            x.reshape(-1, x.shape[-1]),
            kernel.astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits.reshape(*x.shape[:2], -1)

    @property
    def moe_layers(self) -> list[jaxmoe.MoE]:
        """The mixtures of experts, in the order of `Output.stats`."""
        return [block.moe for block in self.blocks if block.moe is not None]

    def update_bias(self, stats: jaxmoe.MoEStats, rate: float) -> None:
        """Moves each layer's selection bias against its load in `stats`, stacked as in `Output`."""
        for i, moe in enumerate(self.moe_layers):
            moe.update_bias(jax.tree.map(lambda leaf, i=i: leaf[i], stats), rate)


def split_model(
    model: Transformer,
) -> tuple[nnx.GraphDef[Transformer], nnx.State, nnx.State]:
    """A model's structure, the parameters that the optimiser trains, and the routers' state.

    That is their selection biases, and the placements of experts that can move.
    """
    graphdef, params, router = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, params, router


def quantize_model(
    model: Transformer, dtype: str
) -> tuple[nnx.GraphDef[Transformer], nnx.State, nnx.State]:
    """A trained model with quantised routed experts, split like `split_model`.

    dtype: as `jaxmoe.compress.quantize_layer` takes it.

    What is quantised is no parameter any more: it comes with the routers' biases.
    """
    for block in model.blocks:
        if block.moe is not None:
            block.moe = compress.quantize_layer(block.moe, dtype)
    return split_model(model)
