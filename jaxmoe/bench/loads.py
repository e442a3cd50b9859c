"""Loads: which experts the tokens of all devices choose. Made on the host, equal in all processes.

A load is named `uniform`, `zipf:S` or `hot`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_SEED = 20251
_DEFAULT_EXPONENT = 1.2


@dataclasses.dataclass(frozen=True)
class Load:
    """A load that `parse` has understood."""

    name: str
    probabilities: Callable[[int], np.ndarray]
    """How often each of E experts is chosen, up to a common factor."""
    first_expert: int | None = None
    """The first choice of every token, if they all agree."""


def parse(text: str) -> Load:
    """The load of a name; raises ValueError for one that there is none of."""
    kind, _, parameter = text.partition(":")
    if kind == "zipf":
        return _zipf(text, parameter)
    if text == "uniform":
        return Load(text, np.ones)
    if text == "hot":
        return Load(text, np.ones, first_expert=0)
    raise ValueError(
        f"--routing must be uniform, zipf:S (expert of rank i chosen in proportion to 1/i^S, as in "
        f"zipf:1.2) or hot (every token's first choice is expert 0), got {text!r}."
    )


def _zipf(text: str, parameter: str) -> Load:
    try:
        exponent = float(parameter or _DEFAULT_EXPONENT)
    except ValueError:
        exponent = math.nan
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ValueError(
            f"--routing zipf:S needs a number S of at least 0, got {text!r}. "
            f"Use zipf:{_DEFAULT_EXPONENT}, or uniform for S = 0."
        )

    def probabilities(num_experts: int) -> np.ndarray:
        ranks = np.random.default_rng(_SEED).permutation(num_experts) + 1.0
        return ranks**-exponent

    return Load(f"zipf:{exponent:g}", probabilities)


def expert_ids(
    load: Load, num_devices: int, num_tokens: int, top_k: int, num_experts: int
) -> np.ndarray:
    """[R, T, K] int32: each token's distinct experts, drawn one after the other without return.

    By the Gumbel-top-k trick: the K largest of `log p + Gumbel noise` are such a sample, in its
    order (Kool, van Hoof and Welling, ICML 2019, section 2.3).
    """
    rng = np.random.default_rng(_SEED + 1)
    log_p = np.log(load.probabilities(num_experts)).astype(np.float32)
    ids = np.empty((num_devices, num_tokens, top_k), np.int32)
    for device in range(num_devices):  # one at a time: [T, E] numbers, not [R, T, E]
        score = log_p + rng.gumbel(size=(num_tokens, num_experts)).astype(np.float32)
        if load.first_expert is not None:
            score[:, load.first_expert] = np.inf
        top = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
        order = np.argsort(-np.take_along_axis(score, top, axis=1), axis=1, kind="stable")
        ids[device] = np.take_along_axis(top, order, axis=1)
    return ids


def choice_weights(num_devices: int, num_tokens: int, top_k: int) -> np.ndarray:
    """[R, T, K] float32 that sum to one for each token."""
    weights = np.random.default_rng(_SEED + 2).random((num_devices, num_tokens, top_k)) + 0.1
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)
