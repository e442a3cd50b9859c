"""Attention of the example's transformer: RMSNorm, RoPE, grouped queries and the decoding cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from linear import Linear, residual_std
from presets import ModelConfig


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)


def rope(
    x: Float[Array, "B S N H"], positions: Int32[Array, "B S"], theta: float
) -> Float[Array, "B S N H"]:
    """Rotary position embedding (Su et al., 2021).

    Pair i of a head, its elements i and i + H/2, turns by the angle position / theta^(2i/H).
    """
    half = x.shape[-1] // 2
    rate = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * rate
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class KVCache(NamedTuple):
    """Keys and values of one layer; slot i of a row holds its token at position i."""

    keys: Float[Array, "B C G H"]
    values: Float[Array, "B C G H"]


def empty_cache(config: ModelConfig, batch_size: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `length` free slots for each of `batch_size` rows."""
    shape = (batch_size, length, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Attention(nnx.Module):
    """Causal attention of grouped queries (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
        std, back = config.init_std, residual_std(config)
        self.query = Linear(config.dim, heads * width, std=std, dtype=dtype, rngs=rngs)
        self.key = Linear(config.dim, groups * width, std=std, dtype=dtype, rngs=rngs)
        self.value = Linear(config.dim, groups * width, std=std, dtype=dtype, rngs=rngs)
        self.out = Linear(heads * width, config.dim, std=back, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int32[Array, "B S"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Attends to the tokens at or before each position: those of x, or with a cache its own.

        With a cache the new keys and values are written to the slots `positions` first. Slots after
        a query's position are never read, so they may hold anything.
        """
        cfg = self.config
        split = (*x.shape[:2], -1, cfg.head_dim)
        query = rope(self.query(x).reshape(split), positions, cfg.rope_theta)
        key = rope(self.key(x).reshape(split), positions, cfg.rope_theta)
        value = self.value(x).reshape(split)
        if cache is None:
            y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            cache = _write(cache, key, value, positions)
            slots = jnp.arange(cache.keys.shape[1], dtype=jnp.int32)
            visible: Bool[Array, "B 1 S C"] = slots <= positions[:, None, :, None]
            y = jax.nn.dot_product_attention(query, cache.keys, cache.values, mask=visible)
        return self.out(y.reshape(*x.shape[:2], -1)), cache


def _write(
    cache: KVCache,
    key: Float[Array, "B S G H"],
    value: Float[Array, "B S G H"],
    positions: Int32[Array, "B S"],
) -> KVCache:
    """The cache with the keys and values at `positions`, which grow by one along S."""

    def write_row(slots: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=0)

    write = jax.vmap(write_row)
    start = positions[:, 0]
    return KVCache(write(cache.keys, key, start), write(cache.values, value, start))
