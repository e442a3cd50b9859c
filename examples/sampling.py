"""Choosing the next token from logits: greedy, temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from presets import SettingsError


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens can be drawn."""
    top_p: float = 1.0
    """Only the fewest most likely tokens whose probabilities sum to at least p can be drawn."""
    seed: int = 0
    """The same seed, prompt and settings give the same text, whatever else is in the batch."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SettingsError(f"temperature ({self.temperature}) must be 0 (greedy) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise SettingsError(f"top_k ({self.top_k}) must be at least 1; leave it out for all.")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p ({self.top_p}) must be above 0 and at most 1.")


def sample(
    config: SamplingConfig, logits: Float[Array, "B V"], step: Int32[Array, ""]
) -> Int32[Array, " B"]:
    """The next token of each row; `step` numbers the draws of a row."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    logits = jnp.where(allowed(config, logits), logits, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    # A key for each row, so that a row's draws do not depend on how many rows there are.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def allowed(config: SamplingConfig, logits: Float[Array, "B V"]) -> Bool[Array, "B V"]:
    """The tokens that top-k and then top-p leave; the most likely one always stays.

    Tokens as likely as the last one that stays, stay as well.
    """
    vocab_size = logits.shape[-1]
    top_k = vocab_size if config.top_k is None else min(config.top_k, vocab_size)
    if top_k == vocab_size and config.top_p == 1:
        return jnp.ones(logits.shape, bool)
    best = jax.lax.top_k(logits, top_k)[0]
    probabilities = jax.nn.softmax(best, axis=-1)
    # A token stays while the ones before it do not reach p.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    stays = (before < config.top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(stays, best, jnp.inf), axis=-1, keepdims=True)
    return logits >= least
