"""`RouterConfig`: how router logits become experts and weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

Score = Literal["softmax", "sigmoid"]


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
        expert_capacity_factor: an expert takes at most
            ``n * ceil(ceil(expert_capacity_factor * T * K) / P)`` of the T * K choices of a call of
            `route`, in `MoE` those of a device's tokens, with n replicas of its own and P of all
            experts (1 and E without replicas). Of more, those of the largest scores stay, of equal
            ones those of the first token. The rule is known before dispatch: what has no room is
            never sent. None: no bound.
        capacity_retries: so often the choices without room are made again, each time for the best
            of the token's experts that have room left; what has none in the end is dropped. 0:
            dropped at once. (After capacity-aware token drop and reroute, arXiv 2503.05066.)

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
    expert_capacity_factor: float | None = None
    capacity_retries: int = 0

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
        _check_capacity(self.expert_capacity_factor, self.capacity_retries)


def _check_capacity(factor: float | None, retries: int) -> None:
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ValueError(
            f"`RouterConfig`: expert_capacity_factor ({factor}) must be finite and positive, the "
            "most that an expert takes by an even share. Use None for no bound."
        )
    if retries < 0 or (retries and factor is None):
        raise ValueError(
            f"`RouterConfig`: capacity_retries ({retries}) must be at least 0, and 0 without "
            f"expert_capacity_factor ({factor}), which leaves nothing to try again."
        )
