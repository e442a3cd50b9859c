"""`transport="xla"`: dispatch, combine and their gradients in plain `jax.lax`. The specification.

Every other transport is compared with this one: dispatch bit for bit, combine by the same order of
summation. The four functions here are what a transport consists of; `jaxmoe.ops` wraps them.

Layout rules
  Rows of a device are ordered by (local expert, source device, token, choice).
Capacity rule
  A device has C rows. Of all choices addressed to it, the first C in the order (choice k, token t,
  source device s) are kept: every token's first choice goes before any token's second one, and no
  source device is favoured. The others are dropped.
Summation rule
  A device sums a token's rows over k = 0 … K-1 in float32 (product first, then the sum, each
  rounded), rounds the partial sum to the row dtype if it travels to another device, and the
  token's owner adds the partial sums in float32 over devices 0 … R-1 and rounds once to the row
  dtype. With one device there is no rounding in between.
Wire rule
  With `wire_dtype` every token passes through the wire format of `jaxmoe.wire`, also those of the
  device's own: rows do not depend on where a token comes from. Nothing else is quantised: partial
  sums and gradients travel in the dtype of the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jaxmoe import wire
from jaxmoe._vma import zeros_alike
from jaxmoe.plan import Plan

if TYPE_CHECKING:
    from jaxmoe.group import ExpertParallel

I32 = jnp.int32
F32 = jnp.float32


def dispatch(
    group: ExpertParallel,
    site: int,
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
) -> tuple[Any, Float32[Array, " C"], Plan]:
    """All-gather tokens and choices, then keep what is addressed to this device."""
    del site
    if x.shape[0] == 0:
        return _dispatch_nothing(group, x)
    num_choices = group.top_k
    sent = (x,) if group.wire_dtype is None else wire.quantize(x, group.wire_scale)
    all_ids, all_weights, *all_sent = (_all_gather(group, a) for a in (expert_ids, weights, *sent))
    valid = (expert_ids >= 0) & (expert_ids < group.num_experts)
    plan = make_plan(
        all_ids,
        rank=_rank(group),
        num_experts=group.num_experts,
        num_local_experts=group.num_local_experts,
        capacity=group.capacity(x.shape[0]),
        choice_device=jnp.where(valid, expert_ids // I32(group.num_local_experts), I32(-1)),
        num_invalid=jnp.sum((~valid) & (expert_ids != -1), dtype=I32),
    )
    used = plan.row_source >= 0
    choice = jnp.maximum(plan.row_source, 0)
    arrived = [a.reshape(-1, a.shape[-1])[choice // I32(num_choices)] for a in all_sent]
    arrived = [jnp.where(used[:, None], a, jnp.zeros((), a.dtype)) for a in arrived]
    row_weights = jnp.where(used, all_weights.reshape(-1)[choice], F32(0))
    return _received(group, arrived), row_weights, plan


def _received(group: ExpertParallel, arrived: list[jax.Array]) -> Any:
    """Rows of what came over the wire."""
    if group.wire_dtype is None:
        return arrived[0]
    codes, scales = arrived
    if group.rows_dtype is None:
        return wire.dequantize(codes, scales, group.dtype)
    return wire.hand_over(codes, scales)


def _dispatch_nothing(
    group: ExpertParallel, x: Float[Array, "0 D"]
) -> tuple[Any, Float32[Array, " 0"], Plan]:
    """`dispatch` without tokens: no device has rows, and nothing travels.

    Not left to the general case, because XLA's compilers fail on collectives of empty arrays.
    """

    def ints(*shape: int) -> jax.Array:
        return zeros_alike(x, I32, shape)

    plan = Plan(
        group_sizes=ints(group.num_local_experts),
        num_rows=ints(),
        num_dropped=ints(),
        num_invalid=ints(),
        row_map=ints(group.num_devices, 0, group.top_k),
        row_source=ints(0),
        choice_device=ints(0, group.top_k),
    )
    rows: Any = zeros_alike(x)
    if group.rows_dtype is not None:
        scales = zeros_alike(x, F32, (0, wire.num_blocks(group.dim)))
        rows = wire.QuantizedRows(rows.astype(group.rows_dtype), scales)
    return rows, zeros_alike(x, F32, (0,)), plan


def make_plan(
    all_ids: Int32[Array, "R T K"],
    *,
    rank: Int32[Array, ""],
    num_experts: int,
    num_local_experts: int,
    capacity: int,
    choice_device: Int32[Array, "T K"],
    num_invalid: Int32[Array, ""],
) -> Plan:
    """The plan of device `rank`, given everybody's choices."""
    num = all_ids.size
    local = all_ids - rank * I32(num_local_experts)
    mine = (local >= 0) & (local < num_local_experts) & (all_ids >= 0) & (all_ids < num_experts)

    by_priority = jnp.transpose(mine, (2, 1, 0))  # (k, t, s)
    place = jnp.cumsum(by_priority.reshape(-1), dtype=I32).reshape(by_priority.shape) - 1
    kept = mine & (jnp.transpose(place, (2, 1, 0)) < capacity)

    key = jnp.where(kept, local, I32(num_local_experts)).reshape(-1)
    order = jnp.argsort(key, stable=True).astype(I32)
    row_of = jnp.zeros(num, I32).at[order].set(jnp.arange(num, dtype=I32))
    num_rows = jnp.sum(kept, dtype=I32)
    return Plan(
        group_sizes=jnp.bincount(key, length=num_local_experts + 1)[:-1].astype(I32),
        num_rows=num_rows,
        num_dropped=jnp.sum(mine, dtype=I32) - num_rows,
        num_invalid=num_invalid,
        row_map=jnp.where(kept, row_of.reshape(all_ids.shape), I32(-1)),
        row_source=jnp.where(jnp.arange(capacity, dtype=I32) < num_rows, order[:capacity], I32(-1)),
        choice_device=choice_device,
    )


def combine(
    group: ExpertParallel,
    site: int,
    expert_rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """Weighted partial sums here, one all-to-all, then the sum over devices."""
    del site
    if plan.row_map.shape[1] == 0:
        return zeros_alike(expert_rows)
    return _sum_to_owners(group, expert_rows, row_weights, plan)


def dispatch_grad(
    group: ExpertParallel,
    site: int,
    d_rows: Float[Array, "C D"],
    d_row_weights: Float32[Array, " C"],
    plan: Plan,
) -> tuple[Float[Array, "T D"], Float32[Array, "T K"]]:
    """The transpose of `dispatch`: an unweighted combine, and each choice's weight gradient."""
    del site
    if plan.row_map.shape[1] == 0:
        no_weights = zeros_alike(d_row_weights, shape=(0, group.top_k))
        return zeros_alike(d_rows), no_weights
    d_x = _sum_to_owners(group, d_rows, jnp.ones_like(d_row_weights), plan)
    there = plan.row_map >= 0
    sent = jnp.where(there, d_row_weights[jnp.maximum(plan.row_map, 0)], F32(0))
    received = _all_to_all(group, sent)
    device = plan.choice_device
    picked = jnp.take_along_axis(received, jnp.maximum(device, 0)[None], axis=0)[0]
    return d_x, jnp.where(device >= 0, picked, F32(0))


def combine_grad(
    group: ExpertParallel,
    site: int,
    d_y: Float[Array, "T D"],
    expert_rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
) -> tuple[Float[Array, "C D"], Float32[Array, " C"]]:
    """The transpose of `combine`: a row gets weight times token gradient, a weight their dot."""
    del site
    if d_y.shape[0] == 0:
        return zeros_alike(expert_rows), zeros_alike(row_weights)
    used = plan.row_source >= 0
    token = jnp.maximum(plan.row_source, 0) // I32(group.top_k)
    d_token = _all_gather(group, d_y).reshape(-1, d_y.shape[1])[token].astype(F32)
    d_rows = jnp.where(used[:, None], row_weights[:, None] * d_token, F32(0))
    d_row_weights = jnp.where(used, jnp.sum(d_token * expert_rows.astype(F32), axis=1), F32(0))
    return d_rows.astype(d_y.dtype), d_row_weights


def _sum_to_owners(
    group: ExpertParallel,
    rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """The summation rule at the head of this file."""
    partial = jnp.zeros((*plan.row_map.shape[:2], rows.shape[1]), F32)
    for k in range(plan.row_map.shape[2]):
        row = plan.row_map[:, :, k, None]
        at = jnp.maximum(row[..., 0], 0)
        term = row_weights[at][..., None] * rows[at].astype(F32)
        partial = partial + jnp.where(row >= 0, term, F32(0))
    rank = _rank(group)
    received = _all_to_all(group, partial.astype(rows.dtype))
    own = lax.dynamic_index_in_dim(partial, rank, keepdims=False)
    total = jnp.zeros_like(own)
    for device in range(group.num_devices):
        total = total + jnp.where(rank == device, own, received[device].astype(F32))
    return total.astype(rows.dtype)


def _rank(group: ExpertParallel) -> Int32[Array, ""]:
    return lax.axis_index(group.axis).astype(I32) if group.axis else jnp.zeros((), I32)


def _all_gather(group: ExpertParallel, a: jax.Array) -> jax.Array:
    return lax.all_gather(a, group.axis) if group.axis else a[None]


def _all_to_all(group: ExpertParallel, a: jax.Array) -> jax.Array:
    return lax.all_to_all(a, group.axis, 0, 0, tiled=True) if group.axis else a
