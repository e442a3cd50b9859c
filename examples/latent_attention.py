"""Multi-head latent attention: keys and values come from one short vector for each token."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from attention import RMSNorm, rope, softmax, visible_slots, write_slots
from linear import Linear, residual_std
from presets import ModelConfig


class LatentCache(NamedTuple):
    """What one layer keeps of each token; slot i of a row holds its token at position i."""

    entries: Float[Array, "B C R+P"]
    """The normalised latent, then the turned key: R + P numbers instead of 2 G H."""


class LatentAttention(nnx.Module):
    """Causal attention through a latent (DeepSeek-V2, 2024, section 2.1).

    With N heads of width H, latents of width R and turned keys of width P, for a token x [D]:

        c = norm(x W_c) [R],  k' = rope(x W_k') [P], one for all heads
        q_n [H], q'_n [P] = split of head n of norm(x W_dq) W_q, or of x W_q; q' goes through rope
        k_n = c W_k,n [H],  v_n = c W_v,n [H]
        y = concat_n(sum_j softmax_j((q_n k_n,j + q'_n k'_j) / sqrt(H + P)) v_n,j) W_o

    Training and prefill compute it in this plain form. Decoding computes the same in the absorbed
    form, in which no key or value of an earlier token is ever made, since

        q_n k_n,j = (q_n W_k,n^T) c_j   and   sum_j p_j v_n,j = (sum_j p_j c_j) W_v,n:

    all heads read the cache of c and k' once. For a long prompt the plain form is less work: a
    score costs H + P products there and R + P here.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, width, turned = config.num_heads, config.head_dim, config.rope_head_dim
        rank, query_rank, std = config.kv_lora_rank, config.query_lora_rank, config.init_std

        def linear(din: int, dout: int, std: float = std) -> Linear:
            return Linear(din, dout, std=std, dtype=dtype, rngs=rngs)

        self.query_down = None if query_rank is None else linear(config.dim, query_rank)
        self.query_norm = None if query_rank is None else RMSNorm(query_rank)
        self.query = linear(query_rank or config.dim, heads * (width + turned))
        self.down = linear(config.dim, rank + turned)
        self.latent_norm = RMSNorm(rank)
        self.key_up = linear(rank, heads * width)
        self.value_up = linear(rank, heads * width)
        self.out = linear(heads * width, config.dim, residual_std(config))

    def empty_cache(self, batch_size: int, length: int) -> LatentCache:
        """`length` free slots for each of `batch_size` rows."""
        width = self.config.kv_lora_rank + self.config.rope_head_dim
        return LatentCache(jnp.zeros((batch_size, length, width), self.query.dtype))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int32[Array, "B S"],
        cache: LatentCache | None = None,
        *,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B S D"], LatentCache | None]:
        """As `Attention`: plain without a cache or with a fresh one, else absorbed."""
        query = self._queries(x, positions)
        entries = self._entries(x, positions)
        if cache is not None:
            cache = LatentCache(write_slots(cache.entries, entries, positions, fresh=fresh))
        if cache is None or fresh:
            y = self._plain(query, entries, positions)
        else:
            y = self._absorbed(query, cache.entries, positions)
        return self.out(y.reshape(*x.shape[:2], -1)), cache

    def _queries(self, x: Array, positions: Array) -> Float[Array, "B S N H+P"]:
        cfg = self.config
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        query = self.query(x).reshape(*x.shape[:2], cfg.num_heads, -1)
        still, turned = jnp.split(query, [cfg.head_dim], axis=-1)
        return jnp.concatenate([still, rope(turned, positions, cfg.rope_theta)], axis=-1)

    def _entries(self, x: Array, positions: Array) -> Float[Array, "B S R+P"]:
        """What the cache keeps of these tokens."""
        cfg = self.config
        latent, key = jnp.split(self.down(x), [cfg.kv_lora_rank], axis=-1)
        turned = rope(key[:, :, None], positions, cfg.rope_theta)[:, :, 0]
        return jnp.concatenate([self.latent_norm(latent), turned], axis=-1)

    @property
    def _scale(self) -> float:
        return (self.config.head_dim + self.config.rope_head_dim) ** -0.5

    def _plain(
        self,
        query: Float[Array, "B S N H+P"],
        entries: Float[Array, "B C R+P"],
        positions: Int32[Array, "B S"],
    ) -> Float[Array, "B S N H"]:
        cfg = self.config
        latent, turned = jnp.split(entries, [cfg.kv_lora_rank], axis=-1)
        split = (*latent.shape[:2], cfg.num_heads, cfg.head_dim)
        key, value = self.key_up(latent).reshape(split), self.value_up(latent).reshape(split)
        shared = jnp.broadcast_to(turned[:, :, None], (*split[:3], cfg.rope_head_dim))
        scores = jnp.einsum(
            "bsnh,bcnh->bnsc",
            query,
            jnp.concatenate([key, shared], axis=-1),
            preferred_element_type=jnp.float32,
        )
        visible = visible_slots(positions, entries.shape[1])[:, None]
        weights = softmax(scores * self._scale, visible).astype(query.dtype)
        return jnp.einsum("bnsc,bcnh->bsnh", weights, value)

    def _absorbed(
        self,
        query: Float[Array, "B S N H+P"],
        entries: Float[Array, "B C R+P"],
        positions: Int32[Array, "B S"],
    ) -> Float[Array, "B S N H"]:
        # `einsum` makes its second operand the left one of a product. So the products come out in
        # the order in which they are needed: on GPUs a transpose takes as long as a product here.
        cfg = self.config
        rank, split = cfg.kv_lora_rank, (cfg.kv_lora_rank, cfg.num_heads, cfg.head_dim)
        key_up = self.key_up.kernel[...].astype(query.dtype).reshape(split)
        value_up = self.value_up.kernel[...].astype(query.dtype).reshape(split)
        still, turned = jnp.split(query, [cfg.head_dim], axis=-1)
        absorbed = jnp.einsum("rnh,bsnh->bsnr", key_up, still)
        scores = jnp.einsum(
            "bcr,bsnr->bnsc",
            entries,
            jnp.concatenate([absorbed, turned], axis=-1),
            preferred_element_type=jnp.float32,
        )
        visible = visible_slots(positions, entries.shape[1])[:, None]
        weights = softmax(scores * self._scale, visible).astype(query.dtype)
        # With the turned keys, whose sums are left out then: a product of a slice would copy it.
        mixed = jnp.einsum("bcr,bnsc->bsnr", entries, weights)[..., :rank]
        return jnp.einsum("bsnr,rnh->bsnh", mixed, value_up)
