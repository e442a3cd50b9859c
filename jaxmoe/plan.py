"""The routing plan: what `dispatch` worked out and `combine` needs, as ordinary arrays."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every choice of a `dispatch` went. A pytree of int32 arrays and nothing else.

    A *choice* is one (token, k) pair of a device's `expert_ids`. T tokens per device, K choices per
    token, R devices of the expert axis, L local experts, C rows of the expert buffer. There is no
    state behind a plan: it may be copied, moved, saved, rematerialised and used any number of
      times.

    Attributes:
      group_sizes: [L] rows of each local expert; the sum is `num_rows`.
      num_rows: [] rows in use on this device.
      num_dropped: [] choices of any device addressed to this device's experts that found no room
        in its C rows. Summed over the devices it counts every dropped choice once.
      num_invalid: [] choices of *this* device's tokens whose id was below -1 or at least
        num_experts. They are treated as -1.
      row_map: [R, T, K] the row of this device that holds choice k of token t of source device s;
        -1 if that choice is not here (another device's expert, masked or dropped).
      row_source: [C] the inverse: `(s * T + t) * K + k` of the choice in a row; -1 from `num_rows`
        on.
      choice_device: [T, K] device on the expert axis that was asked for this device's choices;
        -1 for a masked or invalid one. A dropped choice keeps its device.
    """

    group_sizes: Int32[Array, " L"]
    num_rows: Int32[Array, ""]
    num_dropped: Int32[Array, ""]
    num_invalid: Int32[Array, ""]
    row_map: Int32[Array, "R T K"]
    row_source: Int32[Array, " C"]
    choice_device: Int32[Array, "T K"]
