"""What the compressions demand of weights and counts."""

from __future__ import annotations

from typing import Any

import numpy as np

EXPERTS = ("gate", "up", "down")


def checked_experts(params: dict[str, Any], caller: str) -> dict[str, np.ndarray]:
    """`gate`, `up` and `down` in float64."""
    missing = [name for name in EXPERTS if name not in params]
    if missing:
        raise ValueError(
            f"`{caller}`: params lack {', '.join(missing)}, got {', '.join(params) or 'none'}. "
            "Pass one layer's gate, up and down."
        )
    gate, up, down = (np.asarray(params[name]) for name in EXPERTS)
    turned = (*gate.shape[:1], *gate.shape[:0:-1])
    if gate.ndim != 3 or not gate.size or up.shape != gate.shape or down.shape != turned:
        raise ValueError(
            f"`{caller}`: gate {list(gate.shape)}, up {list(up.shape)} and down "
            f"{list(down.shape)} must be [E, D, F], [E, D, F] and [E, F, D]. Pass one layer at a "
            "time, before its up projections are shared."
        )
    experts = {name: np.asarray(params[name], np.float64) for name in EXPERTS}
    for name, weight in experts.items():
        if not np.isfinite(weight).all():
            raise ValueError(
                f"`{caller}`: {name} holds NaN or infinity. Take a checkpoint from before the "
                "training diverged."
            )
    return experts


def checked_counts(counts: Any, num_experts: int, caller: str) -> np.ndarray:
    """Counts in float64; ones for None."""
    if counts is None:
        return np.ones(num_experts)
    counts = np.asarray(counts, np.float64)
    good = counts.shape == (num_experts,) and np.isfinite(counts).all() and (counts >= 0).all()
    if not good or not counts.any():
        raise ValueError(
            f"`{caller}`: counts are {counts.tolist()}; wanted {num_experts} numbers of at least "
            "0, not all of them 0. Add up `MoEStats.tokens_per_expert` of this layer."
        )
    return counts
