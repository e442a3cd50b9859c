"""Routing: which experts each token visits, and with which weights.

Everything here is a pure function of arrays and works on any leading dimensions, under ``jit``,
``vmap``, ``grad``, ``jax.checkpoint`` and inside ``jax.shard_map``; nothing communicates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxmoe.expert_capacity import admit, rooms
from jaxmoe.router_config import RouterConfig as RouterConfig
from jaxmoe.router_config import Score as Score

# The value of a choice whose biased score is NaN or -inf: below every real score, above the -inf of
# an expert that must not be chosen, and finite when two of them are added to a group score.
_LAST_RESORT = float(jnp.finfo(jnp.float32).min) / 2


_DEFAULT_CONFIG = RouterConfig()


class Locality(NamedTuple):
    """Where the experts are, seen from one device; see `jaxmoe.balance.locality_of`.

    Attributes:
        distance: ``[E]`` 0: on this device, 1: on another of its node, 2: on another node.
        node: ``[E]`` the expert's node, from 0 to ``num_nodes - 1``.
    """

    distance: Int32[Array, " experts"]
    node: Int32[Array, " experts"]


class Routing(NamedTuple):
    """What `route` decided for each token.

    Attributes:
        expert_ids: ``[..., K]``, the chosen experts, best first, distinct; -1 means no expert.
            Choices that no expert had room for are left out.
        weights: ``[..., K]``, the factor on each chosen expert's output; 0 where the id is -1.
        scores: ``[..., E]``, scores without bias; each token's row sums to one, for the losses.
        logits: ``[..., E]``, the logits that the scores were computed from, jitter included.
        wanted_ids: ``[..., K]``, what ``expert_ids`` were without ``expert_capacity_factor``: the
            demand, for balancing and its losses. The same array where there is no such bound.

    A token that chooses no expert has ids -1, and zeros in everything else.
    """

    expert_ids: Int32[Array, "*tokens top_k"]
    weights: Float[Array, "*tokens top_k"]
    scores: Float[Array, "*tokens experts"]
    logits: Float[Array, "*tokens experts"]
    wanted_ids: Int32[Array, "*tokens top_k"]


def route(
    logits: Float[Array, "*tokens experts"],
    top_k: int,
    config: RouterConfig = _DEFAULT_CONFIG,
    *,
    bias: Float[Array, " experts"] | None = None,
    mask: Bool[Array, "*tokens"] | None = None,
    key: jax.Array | None = None,
    locality: Locality | None = None,
    replicas: Int[Array, " experts"] | None = None,
) -> Routing:
    """Chooses ``top_k`` experts for each token and weighs them.

    With ``s = softmax(logits)`` or ``sigmoid(logits)``, the chosen set C of a token holds the
    ``top_k`` largest ``s_i + bias_i`` (``logits_i + bias_i`` with ``topk_first``) of its best
    groups, and ``weight_i = scale * s_i / sum_{j in C} s_j``; ``scale * s_i`` unless ``normalize``.
    Of equal values the lower expert id is chosen first. With ``expert_capacity_factor`` C holds the
    choices that found room.

    Arguments:
        logits: ``[..., E]``, any float dtype; all computation is in float32. Any number of tokens,
            none included.
        top_k: experts per token.
        config: see `RouterConfig`.
        bias: ``[E]``, added for the selection only: it never enters a weight and takes no gradient.
            See `update_bias`.
        mask: ``[...]``, False for a token that must choose no expert. None: all tokens count.
        key: PRNG key of the jitter noise; unused without jitter. Inside ``shard_map`` fold the
            device's axis index into it, or all devices draw the same noise.
        locality: where the experts are; needed by the options that say so in `RouterConfig`.
        replicas: ``[E]``, how often each expert is there, for ``expert_capacity_factor``
            (`jaxmoe.balance.Placement.counts`). None: once.

    Returns:
        A `Routing`. Gradients reach the logits through ``weights``, ``scores`` and ``logits``.

    Logits that are not finite:
        -inf: the expert is never chosen. A token that is left with fewer than ``top_k`` experts has
            id -1 and weight 0 in its last choices; with none at all it counts as masked.
        NaN, +inf: all weights, scores and logits of the token become NaN, so that its output is
            visibly NaN; its ids stay distinct and in range. Other tokens are not touched: where
            room is short its choices go first. A masked token's logits are ignored, whatever they
            are.

    Raises:
        TypeError: logits that are not floating point, a mask that is not boolean.
        ValueError: shapes that do not fit, ``top_k`` above the number of experts a token can choose
            from, E not divisible by ``num_groups``, jitter without a key, locality options without
            `Locality`.
    """
    _check(logits, top_k, config, bias, mask)
    _check_locality(logits.shape[-1], top_k, config, locality)
    _check_replicas(logits.shape[-1], config, replicas)
    logits = logits.astype(jnp.float32)
    active = jnp.any(logits != -jnp.inf, axis=-1)
    if mask is not None:
        active &= mask
    if config.jitter:
        logits *= _jitter_factors(logits.shape, config.jitter, key)
    broken = active & jnp.any(jnp.isnan(logits) | (logits == jnp.inf), axis=-1)
    # Whatever stands in a token that does not count cannot reach a gradient.
    logits = jnp.where(active[..., None], logits, 0.0)
    # The sum also makes -0.0 a 0.0; top_k would rank it lower, and the two must tie.
    logits = _apart(logits + jnp.where(broken, jnp.nan, 0.0)[..., None])
    log_scores = _apart(_log_scores(logits, config))

    values, expert_ids, chosen = _select(logits, top_k, config, bias, locality)
    chosen &= active[..., None]
    wanted_ids = jnp.where(chosen, expert_ids, -1)
    ids = _within_capacity(logits, values, wanted_ids, config, replicas)
    if ids is not wanted_ids:
        expert_ids, chosen = jnp.maximum(ids, 0), ids >= 0
    weights = config.scale * _weights(logits, log_scores, expert_ids, chosen, config)
    return Routing(
        expert_ids=ids,
        weights=jnp.where(chosen, weights, 0.0),
        scores=jnp.where(active[..., None], _apart(jax.nn.softmax(log_scores)), 0.0),
        logits=logits,
        wanted_ids=wanted_ids,
    )


def update_bias(
    bias: Float[Array, " experts"],
    tokens_per_expert: Int[Array, " experts"] | Float[Array, " experts"],
    rate: float | Float[Array, ""],
) -> Float[Array, " experts"]:
    """One step of auxiliary-loss-free load balancing, once per training step.

    ``bias_i + rate * sign(mean(load) - load_i)``: an expert above the mean load becomes less
    attractive, one below it more, one at the mean stays.

    Arguments:
        bias: ``[E]``, the selection bias of `route`.
        tokens_per_expert: ``[E]``, the load of the whole global batch (choices before any drop).
        rate: update speed; DeepSeek-V3 uses 0.001.

    Returns:
        The new bias, in the dtype of ``bias``; unchanged when no expert got a token.

    Raises:
        ValueError: when the two shapes differ.

    Source: arXiv 2408.15664, algorithm 1; arXiv 2412.19437, section 2.1.2.
    """
    if bias.ndim != 1 or bias.shape != tokens_per_expert.shape:
        raise ValueError(
            f"`update_bias`: bias has shape {bias.shape} and tokens_per_expert "
            f"{tokens_per_expert.shape}. Give both one value per expert, [E]."
        )
    load = tokens_per_expert.astype(jnp.float32)
    direction = jnp.sign(jnp.mean(load) - load).astype(bias.dtype)
    return bias + jnp.asarray(rate, bias.dtype) * direction


def count_tokens_per_expert(
    expert_ids: Int32[Array, "*choices"], num_experts: int
) -> Int32[Array, " experts"]:
    """How many choices fell on each expert: ``[num_experts]``, before any drop.

    Arguments:
        expert_ids: any shape; -1 and every other id out of range count for no expert.
        num_experts: E.
    """
    ids = expert_ids.reshape(-1)
    # A negative index would count from the end; one past it is dropped.
    ids = jnp.where(ids < 0, num_experts, ids)
    return jnp.zeros(num_experts, jnp.int32).at[ids].add(1, mode="drop")


def _jitter_factors(shape: tuple[int, ...], jitter: float, key: jax.Array | None) -> Array:
    if key is None:
        raise ValueError(
            f"`route`: jitter is {jitter} but key is None. Give a PRNG key, or route with "
            "`dataclasses.replace(config, jitter=0.0)` outside training."
        )
    return jax.random.uniform(key, shape, jnp.float32, 1.0 - jitter, 1.0 + jitter)


@jax.custom_jvp
def _apart(values: Array) -> Array:
    """The values; with a gradient XLA computes them, and it, before what uses them, and whole.

    It would fuse all of the router and its gradient: sums within sums for every element, which on
    GPUs takes minutes to compile. Without a gradient it may: each kernel less counts in decoding.
    """
    return values


@_apart.defjvp
def _apart_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return lax.optimization_barrier(primals[0]), lax.optimization_barrier(tangents[0])


def _log_scores(logits: Array, config: RouterConfig) -> Array:
    """The logarithm of the scores up to a constant per token.

    A softmax of it is the normalised score, over all experts or over the chosen ones, and stays
    exact where the scores themselves underflow and could not be divided by their sum.
    """
    return jax.nn.log_sigmoid(logits) if config.score == "sigmoid" else logits


def _scores(logits: Array, config: RouterConfig) -> Array:
    return jax.nn.sigmoid(logits) if config.score == "sigmoid" else jax.nn.softmax(logits)


def _weights(
    logits: Array, log_scores: Array, expert_ids: Array, chosen: Array, config: RouterConfig
) -> Array:
    """The weights of the chosen experts, [..., K], before the scale; of others anything finite."""
    if config.normalize or (config.topk_first and config.score == "softmax"):
        log_scores = jnp.take_along_axis(log_scores, expert_ids, axis=-1)
        # A softmax over nothing would be NaN, and with it the gradient of what is not used. Where
        # none was refused, a token without a first choice has none.
        refused = config.expert_capacity_factor is not None
        kept = chosen | ~(jnp.any(chosen, -1, keepdims=True) if refused else chosen[..., :1])
        return _apart(jax.nn.softmax(jnp.where(kept, log_scores, -jnp.inf)))
    return jnp.take_along_axis(_scores(logits, config), expert_ids, axis=-1)


def _select(
    logits: Array,
    top_k: int,
    config: RouterConfig,
    bias: Array | None,
    locality: Locality | None,
) -> tuple[Array, Array, Array]:
    """What experts are selected by, [..., E], -inf for those that must not be; the ids [..., K] of
    each token's experts, and whether each is a choice at all.

    An id that is no choice (too few experts with a logit above -inf) is in range, but must not be
    used.
    """
    values = logits if config.topk_first else _scores(logits, config)
    if bias is not None:
        values += bias.astype(jnp.float32)
    if locality is not None and (config.device_penalty or config.node_penalty):
        values -= config.device_penalty * (locality.distance > 0).astype(jnp.float32)
        values -= config.node_penalty * (locality.distance > 1).astype(jnp.float32)
    values = lax.stop_gradient(values)
    values = jnp.where(values > _LAST_RESORT, values, _LAST_RESORT)  # false for NaN too
    values = jnp.where(logits == -jnp.inf, -jnp.inf, values)
    if config.top_groups < config.num_groups:
        values = _keep_top_groups(values, config)
    if locality is not None and config.top_nodes < config.num_nodes:
        values = _keep_top_nodes(values, locality.node, config)
    best, expert_ids = lax.top_k(values, top_k)
    if locality is not None and config.local_slack is not None:
        near = locality.distance == 0
        best, expert_ids = _local_first(values, best, expert_ids, near, config.local_slack)
    return values, expert_ids, best > -jnp.inf


def _within_capacity(
    logits: Array,
    values: Array,
    expert_ids: Array,
    config: RouterConfig,
    replicas: Array | None,
) -> Array:
    """The choices [..., K] for which their experts have room, -1 for the others, best first."""
    if config.expert_capacity_factor is None:
        return expert_ids
    num_experts, top_k = logits.shape[-1], expert_ids.shape[-1]
    scores = lax.stop_gradient(_scores(logits, config)).reshape(-1, num_experts)
    num_choices = scores.shape[0] * top_k
    room = rooms(config.expert_capacity_factor, num_choices, num_experts, replicas)
    ids = expert_ids.reshape(-1, top_k)
    values = values.reshape(-1, num_experts)
    ids = admit(ids, values, scores, room, retries=config.capacity_retries)
    return ids.reshape(expert_ids.shape)


def _local_first(
    values: Array, best: Array, expert_ids: Array, near: Array, slack: float
) -> tuple[Array, Array]:
    """Choices [..., K] with the near experts that are good enough before all others."""
    top_k = best.shape[-1]
    good = near & (values >= best[..., -1:] - slack) & (values > -jnp.inf)
    stages = [lax.top_k(jnp.where(w, values, -jnp.inf), top_k) for w in (good, ~good)]
    found, ids = (jnp.concatenate(parts, -1) for parts in zip(*stages, strict=True))
    # The first stage may have found fewer than K: the second one's best follow them.
    num_good = jnp.minimum(jnp.sum(good, -1, keepdims=True), top_k)
    place = jnp.arange(top_k)
    taken = jnp.where(place < num_good, place, top_k + place - num_good)
    found, ids = (jnp.take_along_axis(a, taken, -1) for a in (found, ids))
    best, order = lax.top_k(found, top_k)
    return best, jnp.take_along_axis(ids, order, -1)


def _keep_top_groups(values: Array, config: RouterConfig) -> Array:
    """Sets the values [..., E] outside each token's best groups to -inf."""
    grouped = values.reshape(*values.shape[:-1], config.num_groups, -1)
    best, _ = lax.top_k(grouped, min(2, grouped.shape[-1]))
    # A group with one expert left must still rank above a group with none.
    second = jnp.where(best[..., 1:] > -jnp.inf, best[..., 1:], 0.0)
    group_scores = best[..., 0] + jnp.sum(second, axis=-1)
    _, group_ids = lax.top_k(group_scores, config.top_groups)
    kept = jnp.any(group_ids[..., None] == jnp.arange(config.num_groups), axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(values.shape)


def _keep_top_nodes(values: Array, node: Array, config: RouterConfig) -> Array:
    """Sets the values [..., E] outside each token's best nodes to -inf."""
    on_node = node == jnp.arange(config.num_nodes)[:, None]
    per_node = jnp.where(on_node, values[..., None, :], -jnp.inf)
    best, _ = lax.top_k(per_node, min(2, values.shape[-1]))
    second = jnp.where(best[..., 1:] > -jnp.inf, best[..., 1:], 0.0)
    _, kept = lax.top_k(best[..., 0] + jnp.sum(second, axis=-1), config.top_nodes)
    return jnp.where(jnp.any(kept[..., None] == node, axis=-2), values, -jnp.inf)


def _check_locality(
    num_experts: int, top_k: int, config: RouterConfig, locality: Locality | None
) -> None:
    if not config.needs_locality:
        return
    if locality is None:
        raise ValueError(
            "`route`: the router has device_penalty, node_penalty, local_slack or top_nodes, but "
            "locality is None. Give `jaxmoe.balance.locality_of(...)`; `MoE` does so itself."
        )
    for name, array in locality._asdict().items():
        if array.shape != (num_experts,):
            raise ValueError(
                f"`route`: locality.{name} has shape {array.shape}; wanted ({num_experts},), one "
                "value per expert. Make it for the experts of this router."
            )
    selectable = num_experts // config.num_nodes * config.top_nodes
    if config.top_nodes < config.num_nodes and top_k > selectable:
        raise ValueError(
            f"`route`: top_k ({top_k}) is more than the {selectable} experts that top_nodes="
            f"{config.top_nodes} of num_nodes={config.num_nodes} have. Raise top_nodes."
        )


def _check_replicas(num_experts: int, config: RouterConfig, replicas: Array | None) -> None:
    if replicas is None:
        return
    if config.expert_capacity_factor is None:
        raise ValueError(
            "`route`: replicas are given, but the router has no expert_capacity_factor, the one "
            "option that needs them. Leave them out."
        )
    if replicas.shape != (num_experts,) or not jnp.issubdtype(replicas.dtype, jnp.integer):
        raise ValueError(
            f"`route`: replicas are {replicas.dtype}{list(replicas.shape)}; wanted {num_experts} "
            "integers, how often each expert of logits is there. Give `Placement.counts`."
        )


def _check(
    logits: Array,
    top_k: int,
    config: RouterConfig,
    bias: Array | None,
    mask: Array | None,
) -> None:
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"`route`: logits are {logits.dtype}{list(logits.shape)}; wanted floating point with "
            "the experts in the last dimension, [..., E]. Give the router's output."
        )
    num_experts = logits.shape[-1]
    if num_experts % config.num_groups:
        raise ValueError(
            f"`route`: the {num_experts} experts of logits must be divisible by num_groups "
            f"({config.num_groups}). Change num_groups in `RouterConfig`, or the number of experts."
        )
    selectable = num_experts // config.num_groups * config.top_groups
    if not 1 <= top_k <= selectable:
        raise ValueError(
            f"`route`: top_k ({top_k}) must lie between 1 and the {selectable} experts a token can "
            f"choose from ({num_experts} experts, top_groups={config.top_groups} of "
            f"num_groups={config.num_groups}). Lower top_k or raise top_groups."
        )
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(
            f"`route`: bias has shape {bias.shape}; wanted ({num_experts},), one value per expert "
            f"of logits {logits.shape}. Give the bias of this layer."
        )
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(
            f"`route`: mask is {mask.dtype}; wanted bool, True for a token that counts. Use "
            "`mask != 0`."
        )
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"`route`: mask has shape {mask.shape}; wanted {logits.shape[:-1]}, one value per "
            f"token of logits {logits.shape}. Reshape or broadcast it."
        )
