"""Attention of the example's transformer: RMSNorm, RoPE, grouped queries and the decoding cache.

`latent_attention.py` has the second kind. Both write a call's new entries into the cache first and
then attend to it; nothing but these entries changes, so that XLA updates a donated cache in place.
"""

from __future__ import annotations

import functools
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


def write_slots(
    cache: Float[Array, "B ... C H"],
    new: Float[Array, "B ... S H"],
    positions: Int32[Array, "B S"],
    *,
    fresh: bool,
) -> Float[Array, "B ... C H"]:
    """The cache with `new` in the slots `positions` of each row, which grow by one along S.

    fresh: the positions are 0, 1, ..., S - 1 in all rows.
    """
    new = new.astype(cache.dtype)
    if fresh:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, 0, axis=cache.ndim - 2)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=cache.ndim - 3)
    return jax.vmap(write)(cache, new, positions[:, 0])


def visible_slots(positions: Int32[Array, "B S"], length: int) -> Bool[Array, "B S C"]:
    """Whether a token at a position may see each of `length` slots: its own and those before."""
    return jnp.arange(length, dtype=jnp.int32) <= positions[:, :, None]


def softmax(scores: Float[Array, "*rows C"], visible: Bool[Array, "*rows C"]) -> Array:
    """In float32 over the visible entries; the others get 0."""
    return jax.nn.softmax(jnp.where(visible, scores.astype(jnp.float32), -jnp.inf), axis=-1)


def fused_implementation(dtype: jnp.dtype, head_dim: int) -> str | None:
    """What `jax.nn.dot_product_attention` should use: cuDNN's kernel where it can run, else None.

    XLA's own form keeps all S x S scores in float32: at a context of 2048 they move more bytes than
    the experts of a layer do. cuDNN takes 16-bit floats on Ampere GPUs and later. Its gradient adds
    up in an order that varies, unless XLA_FLAGS has --xla_gpu_exclude_nondeterministic_ops=true.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or jnp.dtype(dtype).itemsize != 2 or head_dim % 8 or head_dim > 128:
        return None
    capability = getattr(device, "compute_capability", "0")  # "9.0"; of AMD's GPUs "gfx..."
    return "cudnn" if capability.split(".")[0].isdigit() and float(capability) >= 8 else None


class KVCache(NamedTuple):
    """Keys and values of one layer; slot i of a row holds its token at position i."""

    keys: Float[Array, "B G C H"]
    values: Float[Array, "B G C H"]


class Attention(nnx.Module):
    """Causal attention of grouped queries (Ainslie et al., 2023).

    N = num_heads queries share G = num_kv_heads keys and values of width H = head_dim.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
        std, back = config.init_std, residual_std(config)
        self.query = Linear(config.dim, heads * width, std=std, dtype=dtype, rngs=rngs)
        self.key = Linear(config.dim, groups * width, std=std, dtype=dtype, rngs=rngs)
        self.value = Linear(config.dim, groups * width, std=std, dtype=dtype, rngs=rngs)
        self.out = Linear(heads * width, config.dim, std=back, dtype=dtype, rngs=rngs)

    def empty_cache(self, batch_size: int, length: int) -> KVCache:
        """`length` free slots for each of `batch_size` rows."""
        shape = (batch_size, self.config.num_kv_heads, length, self.config.head_dim)
        return KVCache(jnp.zeros(shape, self.query.dtype), jnp.zeros(shape, self.query.dtype))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int32[Array, "B S"],
        cache: KVCache | None = None,
        *,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Attends to the tokens at or before each position: those of x, or with a cache its own.

        With a cache the new keys and values are written to the slots `positions` first. Slots after
        a query's position are never read, so they may hold anything.

        fresh: the cache is empty and the positions are 0, 1, ..., S - 1: x sees itself alone.
        """
        cfg = self.config
        split = (*x.shape[:2], -1, cfg.head_dim)
        query = rope(self.query(x).reshape(split), positions, cfg.rope_theta)
        key = rope(self.key(x).reshape(split), positions, cfg.rope_theta)
        value = self.value(x).reshape(split)
        if cache is not None:
            entries = (key.swapaxes(1, 2), value.swapaxes(1, 2))
            pairs = zip(cache, entries, strict=True)
            cache = KVCache(*(write_slots(c, new, positions, fresh=fresh) for c, new in pairs))
        if cache is None or fresh:
            how = fused_implementation(query.dtype, cfg.head_dim)
            y = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=how)
        else:
            y = self._attend(query, cache, positions)
        return self.out(y.reshape(*x.shape[:2], -1)), cache

    def _attend(
        self, query: Float[Array, "B S N H"], cache: KVCache, positions: Int32[Array, "B S"]
    ) -> Float[Array, "B S N H"]:
        """The slots' values, each read once for all queries that share it.

        The caches are operands of plain products of matrices, which no backend transposes first;
        in `einsum` they come first, since it makes its second operand the left one of the product.
        """
        cfg = self.config
        rows, tokens = positions.shape
        shared = query.reshape(rows, tokens, cfg.num_kv_heads, -1, cfg.head_dim)
        shared = jnp.moveaxis(shared, 1, 3).reshape(rows, cfg.num_kv_heads, -1, cfg.head_dim)
        scores = jnp.einsum(
            "bgch,bgmh->bgmc", cache.keys, shared, preferred_element_type=jnp.float32
        )
        visible = visible_slots(positions, cache.keys.shape[2])[:, None]
        visible = jnp.tile(visible, (1, 1, cfg.num_heads // cfg.num_kv_heads, 1))
        weights = softmax(scores * cfg.head_dim**-0.5, visible).astype(query.dtype)
        y = jnp.matmul(weights, cache.values)
        y = y.reshape(rows, cfg.num_kv_heads, -1, tokens, cfg.head_dim)
        return jnp.moveaxis(y, 3, 1).reshape(query.shape)
