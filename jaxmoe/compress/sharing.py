"""One up projection for all experts: the starting point for training on."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmoe.compress import align
from jaxmoe.compress.checks import EXPERTS, checked_counts, checked_experts

# The first round aligns with the busiest expert, the second with the mean that came of it.
_ROUNDS = 2


def share_up(params: dict[str, Any], counts: Any = None) -> dict[str, Float[np.ndarray, "..."]]:
    """A layer's experts with one up projection: the mean of theirs, weighted by use.

    Hidden units of each expert are first put into the order that brings its up projection nearest
    to the mean's, which does not change the expert. Then, for each unit f, u_f is replaced by the
    mean m_f, and its row of `down` is multiplied by <u_f, m_f> / <m_f, m_f>, the factor that brings
    m_f nearest to u_f. Experts whose up projections are equal, up to order, signs and lengths of
    units, stay what they are. Others change: train on (`MoE(shared_up=True)`). Runs on the host.

    Args:
      params: `gate`, `up` [E, D, F] and `down` [E, F, D]; others are ignored.
      counts: [E] how often each expert was chosen; None: equally.

    Returns:
      `gate` [E, D, F], `up` [1, D, F] and `down` [E, F, D] in their old dtypes.

    Raises:
      ValueError: sizes, counts or numbers that do not fit.
    """
    experts = checked_experts(params, "share_up")
    num_experts = len(experts["gate"])
    counts = checked_counts(counts, num_experts, "share_up")
    share = counts / counts.sum()
    reference = align.one_of(experts, int(np.argmax(share)))["up"]
    aligned = [align.one_of(experts, e) for e in range(num_experts)]
    for _ in range(_ROUNDS):
        aligned = [align.align_up(expert, reference) for expert in aligned]
        reference = sum(s * e["up"] for s, e in zip(share, aligned, strict=True))
    length = (reference**2).sum(0)
    for expert in aligned:
        along = (expert["up"] * reference).sum(0)
        factor = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
        expert["down"] = factor[:, None] * expert["down"]
    shared = {
        "gate": np.stack([expert["gate"] for expert in aligned]),
        "up": reference[None],
        "down": np.stack([expert["down"] for expert in aligned]),
    }
    return {name: shared[name].astype(np.asarray(params[name]).dtype) for name in EXPERTS}
