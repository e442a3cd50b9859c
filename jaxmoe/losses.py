"""Auxiliary losses and statistics of the router.

All are means over the tokens that count, without a coefficient: multiply them yourself. A token
that chose no expert (ids -1) never counts, and with no token left the result is 0. With
``axis_name`` (inside ``jax.shard_map``, a mesh axis or a tuple of them) sums and counts are added
over the devices before they are divided, so that every device holds the value of the global batch,
however unevenly the tokens that count are spread.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxmoe.routing import count_tokens_per_expert

AxisName = str | tuple[str, ...] | None


def load_balance_loss(
    scores: Float[Array, "*tokens experts"],
    expert_ids: Int32[Array, "*tokens top_k"],
    *,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Load balance loss of the Switch Transformer, for any ``top_k``.

    ``E * sum_i f_i P_i``, with ``f_i`` the fraction of all choices that fell on expert i, and
    ``P_i`` the mean score of expert i. 1 when both are uniform, E when every choice falls on one
    expert of score 1. The gradient flows through ``P_i`` only.

    Arguments:
        scores: ``[..., E]``, rows that sum to one: ``Routing.scores``.
        expert_ids: ``[..., K]``; -1 means no expert.
        axis_name: see the module.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: when the leading dimensions differ.

    Source: arXiv 2101.03961, equations 4 to 6, there for ``top_k`` = 1.
    """
    _check_tokens("load_balance_loss", scores, expert_ids)
    num_experts = scores.shape[-1]
    counted = _counted(expert_ids)
    choices = count_tokens_per_expert(expert_ids, num_experts)
    score_sums = _zero_uncounted(scores, counted).reshape(-1, num_experts).sum(0)
    fractions = _ratio(choices, jnp.sum(choices), axis_name)
    mean_scores = _ratio(score_sums, jnp.sum(counted), axis_name)
    return num_experts * jnp.sum(fractions * mean_scores)


def sequence_balance_loss(
    scores: Float[Array, "*batch sequence experts"],
    expert_ids: Int32[Array, "*batch sequence top_k"],
    *,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Sequence-wise balance loss of DeepSeek-V3, the mean over the sequences.

    Per sequence ``sum_i f_i P_i``, with ``f_i = E / (K S) * (choices of expert i)`` and ``P_i`` the
    mean normalised score of expert i over the S tokens of the sequence that count. 1 when both are
    uniform. A sequence without such a token does not count. Only ``P_i`` carries a gradient.

    Arguments:
        scores: ``[..., S, E]``, rows that sum to one: ``Routing.scores``.
        expert_ids: ``[..., S, K]``; -1 means no expert, and makes K S smaller by one.
        axis_name: see the module. A device's share of a sequence that is split over devices is
            taken for a sequence of its own.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: when the leading dimensions differ, or there is no sequence dimension.

    Source: arXiv 2412.19437, equations 17 to 20.
    """
    _check_tokens("sequence_balance_loss", scores, expert_ids)
    if scores.ndim < 2:
        raise ValueError(
            f"`sequence_balance_loss`: scores have shape {scores.shape}; wanted [..., S, E]. "
            "Keep the tokens of a sequence in a dimension of their own."
        )
    *batch, length, num_experts = scores.shape
    num_sequences = math.prod(batch)
    scores = scores.reshape(num_sequences, length, num_experts)
    expert_ids = expert_ids.reshape(num_sequences, length, expert_ids.shape[-1])
    counted = _counted(expert_ids)
    choices = jax.vmap(lambda ids: count_tokens_per_expert(ids, num_experts))(expert_ids)
    fractions = _ratio(choices, jnp.sum(choices, axis=-1, keepdims=True))
    score_sums = jnp.sum(_zero_uncounted(scores, counted), axis=1)
    mean_scores = _ratio(score_sums, jnp.sum(counted, axis=1)[:, None])
    per_sequence = num_experts * jnp.sum(fractions * mean_scores, axis=-1)
    return _ratio(jnp.sum(per_sequence), jnp.sum(jnp.any(counted, axis=1)), axis_name)


def router_z_loss(
    logits: Float[Array, "*tokens experts"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Router z-loss: the mean over tokens of ``logsumexp(logits)**2``; it keeps the logits small.

    Arguments:
        logits: ``[..., E]``: ``Routing.logits``.
        mask: ``[...]``, False for a token that must not count, whatever its logits are; as given to
            `route`, or ``expert_ids[..., 0] >= 0``. None: all count.
        axis_name: see the module.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: when the mask has another shape than the tokens.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    tokens = logits.shape[:-1]
    if mask is not None and mask.shape != tokens:
        raise ValueError(
            f"`router_z_loss`: mask has shape {mask.shape}; wanted {tokens}, one value per token "
            f"of logits {logits.shape}. Reshape or broadcast it."
        )
    counted = jnp.ones(tokens, bool) if mask is None else mask
    log_z = jax.nn.logsumexp(_zero_uncounted(logits, counted), axis=-1)
    return _ratio(jnp.sum(jnp.where(counted, log_z**2, 0.0)), jnp.sum(counted), axis_name)


def router_entropy(
    scores: Float[Array, "*tokens experts"], *, axis_name: AxisName = None
) -> Float[Array, ""]:
    """Mean entropy of the scores in nats, ``-sum_i s_i log s_i``; ``log E`` when all are uniform.

    Arguments:
        scores: ``[..., E]``, rows that sum to one: ``Routing.scores``. Rows of zeros do not count.
        axis_name: see the module.

    Returns:
        A float32 scalar.
    """
    scores = scores.astype(jnp.float32)
    positive = jnp.where(scores == 0, 1.0, scores)  # 0 log 0 = 0, with a finite gradient
    entropies = -jnp.sum(positive * jnp.log(positive), axis=-1)
    return _ratio(jnp.sum(entropies), jnp.sum(jnp.any(scores != 0, axis=-1)), axis_name)


def _counted(expert_ids: Array) -> Array:
    """The tokens that chose an expert."""
    return jnp.any(expert_ids >= 0, axis=-1)


def _zero_uncounted(values: Array, counted: Array) -> Array:
    """``values`` [..., E] in float32, 0 for tokens that do not count, whatever they hold."""
    return jnp.where(counted[..., None], values.astype(jnp.float32), 0.0)


def _ratio(total: Array, count: Array, axis_name: AxisName = None) -> Array:
    """``total / count`` over all devices of the axes, 0 where the count is 0."""
    total, count = total.astype(jnp.float32), count.astype(jnp.float32)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return total / jnp.where(count > 0, count, 1.0)


def _check_tokens(name: str, scores: Array, expert_ids: Array) -> None:
    if scores.shape[:-1] != expert_ids.shape[:-1]:
        raise ValueError(
            f"`{name}`: scores {scores.shape} and expert_ids {expert_ids.shape} must agree in all "
            "but the last dimension. Give both from one `Routing`."
        )
