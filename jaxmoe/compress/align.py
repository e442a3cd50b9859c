"""Experts up to what leaves their function as it is: the order and the signs of hidden units.

For any permutation P and signs S = diag(+-1), (silu(x G P) * (x U P S)) (P S)^T D is the same
expert. Only up to those do distances and means of weights say something about functions (Ainsworth
et al. 2022, "Git Re-Basin", section 3.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]  # gate and up [..., D, F], down [..., F, D]


def align(expert: Weights, reference: Weights) -> Weights:
    """The expert with its hidden units in the order, and of the signs, nearest to a reference.

    Minimises the squared distance of all three matrices, which is to maximise
    sum_f <g_f, g'_f> + |<u_f, u'_f> + <d_f, d'_f>| over the assignments of units f to f'.
    """
    gain = reference["gate"].T @ expert["gate"]
    signed = reference["up"].T @ expert["up"] + reference["down"] @ expert["down"].T
    return _reordered(expert, gain, signed)


def align_up(expert: Weights, up: np.ndarray) -> Weights:
    """The expert with its hidden units in the order, and of the signs, that suit one up projection.

    Maximises sum_f |<m_f, u_f>| / |m_f| for the given m: the lengths of what is left of the units u
    when m_f takes their place (`jaxmoe.compress.share_up`).
    """
    length = np.linalg.norm(up, axis=0)[:, None]
    signed = np.divide(
        up.T @ expert["up"], length, out=np.zeros((up.shape[1],) * 2), where=length > 0
    )
    return _reordered(expert, np.zeros_like(signed), signed)


def _reordered(expert: Weights, gain: np.ndarray, signed: np.ndarray) -> Weights:
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment(gain + np.abs(signed), maximize=True)
    signs = np.where(signed[np.arange(len(order)), order] < 0, -1.0, 1.0)
    return {
        "gate": expert["gate"][:, order],
        "up": expert["up"][:, order] * signs,
        "down": expert["down"][order] * signs[:, None],
    }


def mean_of(experts: Weights, members: np.ndarray, counts: np.ndarray) -> Weights:
    """The mean of some experts weighted by their counts, aligned with the busiest of them.

    Experts that are equal up to order and signs give the busiest one exactly, not merely nearly:
    the float64 sum is off by less than half a unit of any narrower dtype's last place.
    """
    share = counts[members].astype(np.float64)
    share = share / share.sum() if share.any() else np.full(len(members), 1 / len(members))
    first = members[np.argmax(share)]
    reference = one_of(experts, first)
    total = {name: np.zeros_like(w) for name, w in reference.items()}
    for expert, weight in zip(members, share, strict=True):
        aligned = reference if expert == first else align(one_of(experts, expert), reference)
        for name in total:
            total[name] += weight * aligned[name]
    return total


def one_of(experts: Weights, expert: Any) -> Weights:
    return {name: w[expert] for name, w in experts.items()}


def distances(experts: Weights) -> np.ndarray:
    """[E, E] Euclidean distances of aligned weights; zero for equal functions of equal units."""
    num = len(experts["gate"])
    result = np.zeros((num, num))
    for i in range(num):
        for j in range(i):
            a = one_of(experts, i)
            b = align(one_of(experts, j), a)
            squares = sum(float(((a[name] - b[name]) ** 2).sum()) for name in a)
            result[i, j] = result[j, i] = squares**0.5
    return result


def output_distances(experts: Weights, inputs: np.ndarray) -> np.ndarray:
    """[E, E] root-mean-square distances of the experts' outputs on tokens [N, D]."""
    from scipy.spatial.distance import pdist, squareform

    outputs = []
    for expert in range(len(experts["gate"])):
        w = one_of(experts, expert)
        gate = inputs @ w["gate"]
        outputs.append(((gate / (1 + np.exp(-gate)) * (inputs @ w["up"])) @ w["down"]).ravel())
    return squareform(pdist(np.stack(outputs))) / len(inputs) ** 0.5
