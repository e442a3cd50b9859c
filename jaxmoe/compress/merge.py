"""Merging similar experts after training, with the map from the router's experts to those left."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from jaxmoe.compress import align
from jaxmoe.compress.checks import EXPERTS, checked_counts, checked_experts

# Of the mean count, in distances: experts that nobody chose still merge with those like them.
_LEAST_COUNT = 1e-3


@dataclasses.dataclass(frozen=True)
class MergedExperts:
    """What is left of E experts.

    Attributes:
      weights: `gate`, `up` [E', D, F] and `down` [E', F, D], in the dtypes of the old ones.
      expert_map: [E] int32, which of the E' each of the router's experts is now.
      merge_distances: [E - 1] at which distance the agglomeration took each step, ascending;
        `threshold` cuts between them.
    """

    weights: dict[str, Float[np.ndarray, "M ..."]]
    expert_map: Int32[np.ndarray, " E"]
    merge_distances: Float[np.ndarray, " steps"]

    num_experts = property(lambda self: len(self.expert_map))
    num_merged = property(lambda self: int(self.expert_map.max()) + 1)


def merge_experts(
    params: dict[str, Any],
    num_groups: int | None = None,
    *,
    threshold: float | None = None,
    counts: Any = None,
    inputs: Any = None,
    multiple_of: int = 1,
) -> MergedExperts:
    """Groups experts that are alike and replaces each group by its mean, weighted by use.

    Groups come from average linkage (scipy; as in HC-SMoE, Chen et al. 2024) of
    d_ij sqrt(w_ij) / |W|, with d the distance of experts i and j, |W| the root-mean-square norm of
    an expert and w_ij = 2 n_i n_j / ((n_i + n_j) mean(n)), which is 1 for experts of mean count:
    those that are seldom chosen merge first (n is taken as at least a thousandth of its mean). In
    a group hidden units are brought into one order (`jaxmoe.compress.align`) before the mean is
    taken. Runs on the host.

    Experts that are equal, up to the order and signs of hidden units, merge at distance 0 and
    exactly: the layer's output is unchanged but for the order of sums.

    Args:
      params: a layer's `gate`, `up` [E, D, F] and `down` [E, F, D]; others are ignored.
      num_groups: E', how many experts to keep.
      threshold: instead of it, merge groups whose mean distance is at most this.
      counts: [E] how often each expert was chosen; None: equally.
      inputs: [N, D] tokens as the experts get them: distances are then of the outputs on these
        instead of the weights, and |W| that of outputs. Aligned weights take E^2 / 2 assignments of
        F units; outputs are much faster with hundreds of experts or wide ones.
      multiple_of: with `threshold`, keep a multiple of this many experts: those of all devices.

    Raises:
      ValueError: sizes, counts or numbers that do not fit, both or neither of `num_groups` and
        `threshold`.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    experts = checked_experts(params, "merge_experts")
    num_experts = len(experts["gate"])
    counts = checked_counts(counts, num_experts, "merge_experts")
    tokens = None if inputs is None else _checked_inputs(inputs, experts["gate"].shape[1])
    _check_wish(num_groups, threshold, multiple_of, num_experts)
    if num_experts == 1:
        heights, labels = np.zeros(0), np.zeros(1, np.int64)
    else:
        cost = _costs(experts, counts, tokens)
        tree = hierarchy.linkage(squareform(cost, checks=False), "average")
        heights = tree[:, 2]
        if num_groups is None:
            assert threshold is not None
            num_groups = num_experts - int(np.sum(heights <= threshold))
            num_groups = min(num_experts, -(-num_groups // multiple_of) * multiple_of)
        labels = hierarchy.cut_tree(tree, n_clusters=num_groups)[:, 0]
    # Groups are numbered by the first expert in each.
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    expert_map = np.argsort(np.argsort(first))[labels].astype(np.int32)
    means = [
        align.mean_of(experts, np.flatnonzero(expert_map == group), counts)
        for group in range(expert_map.max() + 1)
    ]
    weights = {
        name: np.stack([mean[name] for mean in means]).astype(np.asarray(params[name]).dtype)
        for name in EXPERTS
    }
    return MergedExperts(weights, expert_map, heights)


def _costs(experts: align.Weights, counts: np.ndarray, inputs: np.ndarray | None) -> np.ndarray:
    """[E, E] of what linkage compares."""
    if inputs is None:
        distance = align.distances(experts)
        norms = sum((w**2).sum((1, 2)) for w in experts.values())
    else:
        distance = align.output_distances(experts, inputs)
        nothing = {name: np.zeros_like(w[:1]) for name, w in experts.items()}
        both = {name: np.concatenate([w, nothing[name]]) for name, w in experts.items()}
        norms = align.output_distances(both, inputs)[-1, :-1] ** 2
    scale = float(np.mean(norms)) ** 0.5
    n = np.maximum(counts / counts.mean(), _LEAST_COUNT)
    weight = 2 * n[:, None] * n / (n[:, None] + n)
    return distance * np.sqrt(weight) / (scale or 1.0)


def _checked_inputs(inputs: Any, dim: int) -> np.ndarray:
    inputs = np.asarray(inputs, np.float64)
    if inputs.ndim != 2 or inputs.shape[1] != dim or not len(inputs):
        raise ValueError(
            f"`merge_experts`: inputs have shape {list(inputs.shape)}, wanted [N, {dim}]. Flatten "
            "the tokens that the layer got."
        )
    if not np.isfinite(inputs).all():
        raise ValueError(
            "`merge_experts`: inputs hold NaN or infinity. Leave the tokens out that are padding."
        )
    return inputs


def _check_wish(
    num_groups: int | None, threshold: float | None, multiple_of: int, num_experts: int
) -> None:
    if (num_groups is None) == (threshold is None):
        raise ValueError(
            f"`merge_experts`: num_groups is {num_groups} and threshold {threshold}; wanted one of "
            "them. Give num_groups for a size, threshold for a likeness."
        )
    if num_groups is not None and not 1 <= num_groups <= num_experts:
        raise ValueError(
            f"`merge_experts`: num_groups is {num_groups}, wanted 1 to {num_experts}, the experts "
            "there are."
        )
    if threshold is not None and not 0 <= threshold < np.inf:
        raise ValueError(
            f"`merge_experts`: threshold is {threshold}, wanted a finite number of at least 0. 0 "
            "merges equal experts only."
        )
    if multiple_of < 1 or num_experts % multiple_of:
        raise ValueError(
            f"`merge_experts`: multiple_of is {multiple_of}, wanted a divisor of the {num_experts} "
            "experts, such as the number of devices."
        )
