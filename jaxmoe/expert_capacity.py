"""A bound on what each expert takes, kept by the router: who finds room, and who tries elsewhere.

Every device bounds its own tokens, so that nothing has to be exchanged: an expert's room on R
devices is R times that on one.
"""

from __future__ import annotations

import fractions
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32

I32 = jnp.int32


def rooms(
    factor: float, num_choices: int, num_experts: int, replicas: Int[Array, " E"] | None
) -> Int32[Array, " E"]:
    """Choices that each expert takes: `n * ceil(ceil(factor * num_choices) / P)`.

    Arguments:
        factor: 1 is an even share.
        num_choices: T * K.
        num_experts: E.
        replicas: `[E]` n of each expert, P in all. None: one each.
    """
    total = math.ceil(fractions.Fraction(factor).limit_denominator(1 << 20) * num_choices)
    total = I32(min(total, jnp.iinfo(I32).max))
    counts = jnp.ones(num_experts, I32) if replicas is None else replicas.astype(I32)
    each = (total - I32(1)) // jnp.sum(counts) + I32(1)
    # No expert gets more than all choices; so much fits 32 bits.
    each = jnp.clip(each, 1, max(num_choices, 1))
    return jnp.minimum(counts, I32(max(num_choices, 1)) // each + I32(1)) * each


def admit(
    expert_ids: Int32[Array, "N K"],
    values: Float32[Array, "N E"],
    scores: Float32[Array, "N E"],
    room: Int32[Array, " E"],
    *,
    retries: int,
) -> Int32[Array, "N K"]:
    """The choices that find room; the same input gives the same bits.

    An expert keeps the choices of the largest score, of equal ones those of the first token. Then,
    `retries` times: a choice without room goes to the best expert by `values` that has room left
    and that the token does not hold, two choices of a token to the best two; those that have it
    keep their places. A NaN among the scores counts as less than any of them.

    Arguments:
        expert_ids: `[N, K]`, different ones in a row, -1 for none.
        values: `[N, E]` what experts are selected by; -inf for those that must not be.
        scores: `[N, E]`, at least 0, or NaN.
        room: `[E]` choices that each expert takes.
        retries: how often.

    Returns:
        `[N, K]`: different experts in a row, those of larger values first, -1 behind them.
    """
    if expert_ids.size == 0:
        return expert_ids
    top_k, num_experts = expert_ids.shape[-1], values.shape[-1]
    wanted, ids = expert_ids >= 0, expert_ids
    held = wanted & _has_room(ids, scores, room)
    for _ in range(retries):
        kept = jnp.where(held, ids, I32(-1))
        mine = jnp.any(kept[:, :, None] == jnp.arange(num_experts, dtype=I32), axis=1)
        left = room - jnp.zeros_like(room).at[jnp.where(held, ids, num_experts)].add(1, mode="drop")
        best, others = lax.top_k(jnp.where((left > 0) & ~mine, values, -jnp.inf), top_k)
        nth = jnp.maximum(jnp.cumsum(wanted & ~held, axis=-1, dtype=I32) - 1, 0)
        best, others = (jnp.take_along_axis(a, nth, axis=-1) for a in (best, others))
        again = wanted & ~held & (best > -jnp.inf)
        ids = jnp.where(again, others, kept)
        held |= again & _has_room(jnp.where(again, ids, I32(-1)), scores, left)
    found = jnp.take_along_axis(values, jnp.maximum(ids, 0), axis=-1)
    found, order = lax.top_k(jnp.where(held, found, -jnp.inf), top_k)
    return jnp.where(found > -jnp.inf, jnp.take_along_axis(ids, order, axis=-1), I32(-1))


def _has_room(
    expert_ids: Int32[Array, "N K"], scores: Float32[Array, "N E"], room: Int32[Array, " E"]
) -> Bool[Array, "N K"]:
    """Whether a choice is among the best of its expert's, as many as there is room for."""
    num_experts = room.shape[0]
    score = jnp.take_along_axis(scores, jnp.maximum(expert_ids, 0), axis=-1).reshape(-1)
    less = jnp.where(jnp.isnan(score), 1.0, -score)
    expert = jnp.where(expert_ids >= 0, expert_ids, I32(num_experts)).reshape(-1)
    index = jnp.arange(expert.size, dtype=I32)
    expert, _, order = lax.sort((expert, less, index), num_keys=2, is_stable=True)
    first = jnp.concatenate([jnp.ones(1, bool), expert[1:] != expert[:-1]])
    nth = index - lax.cummax(jnp.where(first, index, I32(0)))
    fits = (expert < num_experts) & (nth < room[jnp.minimum(expert, I32(num_experts - 1))])
    return jnp.zeros_like(fits).at[order].set(fits, unique_indices=True).reshape(expert_ids.shape)
