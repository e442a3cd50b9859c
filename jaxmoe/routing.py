"""Routing: which experts each token visits, and with which weights.

Everything here is a pure function of arrays and works on any leading dimensions, under ``jit``,
``vmap``, ``grad``, ``jax.checkpoint`` and inside ``jax.shard_map``; nothing communicates.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

Score = Literal["softmax", "sigmoid"]

# The value of a choice whose biased score is NaN or -inf: below every real score, above the -inf of
# an expert that must not be chosen, and finite when two of them are added to a group score.
_LAST_RESORT = float(jnp.finfo(jnp.float32).min) / 2


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How router logits become experts and weights.

    Arguments:
        score: ``"softmax"`` over the experts, or ``"sigmoid"`` of each expert on its own
            (DeepSeek-V3).
        topk_first: choose the experts by their logits and score only the chosen ones (Mixtral);
            otherwise score all experts and choose by score (Switch, DeepSeek). The two orders
            choose differently only with a selection bias or groups. A softmax over the chosen
            experts sums to one, so there ``normalize`` has no effect.
        normalize: divide the weights of a token by their sum, before ``scale``.
        scale: factor on every weight ("routed scaling factor", DeepSeek-V3).
        num_groups: the experts form this many groups of consecutive ids, of equal size.
        top_groups: only experts of a token's best ``top_groups`` groups can be chosen. A group's
            score is the sum of its two best (biased) scores, or its one expert's (DeepSeek-V3).
        jitter: training noise: logits are multiplied by draws from U(1 - jitter, 1 + jitter);
            `route` then needs a key. 0 means none. (After Switch Transformer, arXiv 2101.03961,
            which multiplies the router's input instead.)
        device_penalty: taken off the value that selects an expert on another device, in the unit of
            that value (the score; the logit with ``topk_first``). Like a bias it never enters a
            weight. This and the next four need `Locality`.
        node_penalty: the same for an expert on another node, on top of ``device_penalty``.
        local_slack: two stages. First the experts of this device whose value is at most so much
            below the value of the token's last choice otherwise; then, for the choices left, the
            best of the rest. None: one stage.
        num_nodes: nodes that the devices of the expert axis form.
        top_nodes: only experts of a token's best ``top_nodes`` nodes can be chosen; a node's score
            is that of a group (node-limited routing, DeepSeek-V3).

    Raises:
        ValueError: for a value out of its range.
    """

    score: Score = "softmax"
    topk_first: bool = False
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0
    device_penalty: float = 0.0
    node_penalty: float = 0.0
    local_slack: float | None = None
    num_nodes: int = 1
    top_nodes: int = 1

    @property
    def needs_locality(self) -> bool:
        """Whether `route` must know where the experts are."""
        penalties = bool(self.device_penalty or self.node_penalty)
        return penalties or self.local_slack is not None or self.top_nodes < self.num_nodes

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(
                f"`RouterConfig`: score is {self.score!r}. Use one of {get_args(Score)}."
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(
                f"`RouterConfig`: scale ({self.scale}) must be finite and positive. Use 1.0 to "
                "leave the weights as they are."
            )
        if self.num_groups < 1:
            raise ValueError(
                f"`RouterConfig`: num_groups ({self.num_groups}) must be at least 1. Use 1 to "
                "choose among all experts."
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"`RouterConfig`: top_groups ({self.top_groups}) must lie between 1 and num_groups "
                f"({self.num_groups}). Use num_groups=1, top_groups=1 to choose among all experts."
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(
                f"`RouterConfig`: jitter ({self.jitter}) must be at least 0 and below 1, so that "
                "no logit changes sign. Typical is 0.01; use 0.0 for no noise."
            )
        for name in ("device_penalty", "node_penalty", "local_slack"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"`RouterConfig`: {name} ({value}) must be finite and at least 0. Use "
                    f"{'None' if name == 'local_slack' else '0.0'} to switch it off."
                )
        if not 1 <= self.top_nodes <= self.num_nodes:
            raise ValueError(
                f"`RouterConfig`: top_nodes ({self.top_nodes}) must lie between 1 and num_nodes "
                f"({self.num_nodes}). Use num_nodes=1, top_nodes=1 to choose among all nodes."
            )


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
        weights: ``[..., K]``, the factor on each chosen expert's output; 0 where the id is -1.
        scores: ``[..., E]``, scores without bias; each token's row sums to one, for the losses.
        logits: ``[..., E]``, the logits that the scores were computed from, jitter included.

    A token that chooses no expert has ids -1, and zeros in everything else.
    """

    expert_ids: Int32[Array, "*tokens top_k"]
    weights: Float[Array, "*tokens top_k"]
    scores: Float[Array, "*tokens experts"]
    logits: Float[Array, "*tokens experts"]


def route(
    logits: Float[Array, "*tokens experts"],
    top_k: int,
    config: RouterConfig = _DEFAULT_CONFIG,
    *,
    bias: Float[Array, " experts"] | None = None,
    mask: Bool[Array, "*tokens"] | None = None,
    key: jax.Array | None = None,
    locality: Locality | None = None,
) -> Routing:
    """Chooses ``top_k`` experts for each token and weighs them.

    With ``s = softmax(logits)`` or ``sigmoid(logits)``, the chosen set C of a token holds the
    ``top_k`` largest ``s_i + bias_i`` (``logits_i + bias_i`` with ``topk_first``) of its best
    groups, and ``weight_i = scale * s_i / sum_{j in C} s_j``; ``scale * s_i`` unless ``normalize``.
    Of equal values the lower expert id is chosen first.

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

    Returns:
        A `Routing`. Gradients reach the logits through ``weights``, ``scores`` and ``logits``.

    Logits that are not finite:
        -inf: the expert is never chosen. A token that is left with fewer than ``top_k`` experts has
            id -1 and weight 0 in its last choices; with none at all it counts as masked.
        NaN, +inf: all weights, scores and logits of the token become NaN, so that its output is
            visibly NaN; its ids stay distinct and in range. Other tokens are not touched. A masked
            token's logits are ignored, whatever they are.

    Raises:
        TypeError: logits that are not floating point, a mask that is not boolean.
        ValueError: shapes that do not fit, ``top_k`` above the number of experts a token can choose
            from, E not divisible by ``num_groups``, jitter without a key, locality options without
            `Locality`.
    """
    _check(logits, top_k, config, bias, mask)
    _check_locality(logits.shape[-1], top_k, config, locality)
    logits = logits.astype(jnp.float32)
    active = jnp.any(logits != -jnp.inf, axis=-1)
    if mask is not None:
        active &= mask
    # Replaced before any computation, so that whatever stands in them cannot reach a gradient.
    logits = jnp.where(active[..., None], logits, 0.0)
    if config.jitter:
        logits *= _jitter_factors(logits.shape, config.jitter, key)
    broken = jnp.any(jnp.isnan(logits) | (logits == jnp.inf), axis=-1, keepdims=True)
    # The sum also makes -0.0 a 0.0; top_k would rank it lower, and the two must tie.
    logits += jnp.where(broken, jnp.nan, 0.0)

    expert_ids, chosen = _select(logits, top_k, config, bias, locality)
    weights = config.scale * _weights(logits, expert_ids, chosen, config)
    chosen &= active[..., None]
    return Routing(
        expert_ids=jnp.where(chosen, expert_ids, -1),
        weights=jnp.where(chosen, weights, 0.0),
        scores=jnp.where(active[..., None], jax.nn.softmax(_log_scores(logits, config)), 0.0),
        logits=logits,
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


def _log_scores(logits: Array, config: RouterConfig) -> Array:
    """The logarithm of the scores up to a constant per token.

    A softmax of it is the normalised score, over all experts or over the chosen ones, and stays
    exact where the scores themselves underflow and could not be divided by their sum.
    """
    return jax.nn.log_sigmoid(logits) if config.score == "sigmoid" else logits


def _scores(logits: Array, config: RouterConfig) -> Array:
    return jax.nn.sigmoid(logits) if config.score == "sigmoid" else jax.nn.softmax(logits)


def _weights(logits: Array, expert_ids: Array, chosen: Array, config: RouterConfig) -> Array:
    """The weights of the chosen experts, [..., K], before the scale. Every token has chosen one."""
    if config.normalize or (config.topk_first and config.score == "softmax"):
        log_scores = jnp.take_along_axis(_log_scores(logits, config), expert_ids, axis=-1)
        return jax.nn.softmax(jnp.where(chosen, log_scores, -jnp.inf))
    return jnp.take_along_axis(_scores(logits, config), expert_ids, axis=-1)


def _select(
    logits: Array,
    top_k: int,
    config: RouterConfig,
    bias: Array | None,
    locality: Locality | None,
) -> tuple[Array, Array]:
    """The ids [..., K] of each token's experts, and whether each is a choice at all.

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
    return expert_ids, best > -jnp.inf


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
