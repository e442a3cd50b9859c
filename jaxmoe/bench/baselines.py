"""Other ways to the same result, in plain JAX, that a custom call has to beat.

Each class has the four functions of `jaxmoe.reference`, with the same rows in the same order. What
`dispatch` returns third is a pytree of arrays of its own, which the others take.

`AllGather` is the plain dense way: every device gets all tokens and picks its own, and partial sums
for all tokens go back by a reduce-scatter. It is the one that is hard to beat on few devices.
`Ragged` sends one copy per choice through `lax.ragged_all_to_all`, as layers written for TPUs do
(MaxText's among them). It has no rule for choices without room, so nothing may be dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe import reference
from jaxmoe._vma import zeros_alike
from jaxmoe.group import ExpertParallel
from jaxmoe.plan import Plan

I32 = jnp.int32
F32 = jnp.float32
# XLA's own: true unless set, read when a program is compiled.
ONE_SHOT_FLAG = "xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel"
# XLA since jax 0.11.1 refuses to run without that kernel unless told so.
_FALLBACK_FLAG = "xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback"


@dataclasses.dataclass(frozen=True)
class AllGather:
    """All-gather of tokens; scatter-add and reduce-scatter of sums."""

    group: ExpertParallel

    def dispatch(self, x: Any, ids: Any, weights: Any) -> tuple[Any, Any, Plan]:
        """The reference's own: it is an all-gather already."""
        return reference.dispatch(self.group, 0, x, ids, weights)

    def combine(self, rows: Any, row_weights: Any, plan: Plan) -> Any:
        terms = row_weights[:, None] * rows.astype(F32)
        return self._to_owners(terms, self._token(plan), plan).astype(rows.dtype)

    def dispatch_grad(self, d_rows: Any, d_row_weights: Any, plan: Plan) -> tuple[Any, Any]:
        d_x = self._to_owners(d_rows.astype(F32), self._token(plan), plan).astype(d_rows.dtype)
        slots = jnp.where(plan.row_source >= 0, plan.row_source, I32(plan.row_map.size))
        per_choice = zeros_alike(d_row_weights, shape=(plan.row_map.size,))
        per_choice = per_choice.at[slots].add(d_row_weights, mode="drop")
        d_weights = _reduce_scatter(self.group, per_choice.reshape(plan.row_map.shape))
        return d_x, d_weights

    def combine_grad(self, d_y: Any, rows: Any, row_weights: Any, plan: Plan) -> tuple[Any, Any]:
        return reference.combine_grad(self.group, 0, d_y, rows, row_weights, plan)

    def _token(self, plan: Plan) -> Any:
        """[C] the token `s * T + t` of each row; one too many for a row without a choice."""
        num_devices, num_tokens, top_k = plan.row_map.shape
        unused = I32(num_devices * num_tokens)
        return jnp.where(plan.row_source >= 0, plan.row_source // I32(top_k), unused)

    def _to_owners(self, terms: Any, token: Any, plan: Plan) -> Any:
        num_devices, num_tokens, _ = plan.row_map.shape
        dim = terms.shape[1]
        partial = zeros_alike(terms, F32, (num_devices * num_tokens, dim))
        partial = partial.at[token].add(terms, mode="drop")
        partial = partial.astype(self.group.dtype).reshape(num_devices, num_tokens, dim)
        return _reduce_scatter(self.group, partial)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """What `Ragged` remembers of a dispatch. E experts in all, of which L are here.

    A device's choices lie sorted by expert; those for one expert are a segment, sent as one slice.
    """

    order: Any
    """[T * K] the choice `t * K + k` at each place of the sorted choices of this device."""
    sizes: Any
    """[R, E] choices of each device for each expert."""
    weights: Any
    """[T * K] in sorted order."""
    origin: Any
    """[C] source device and place there of each row, as `s * T * K + place`; -1 without one."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """`lax.ragged_all_to_all` of the choices sorted by expert, one slice per expert."""

    group: ExpertParallel

    def dispatch(self, x: Any, ids: Any, weights: Any) -> tuple[Any, Any, Segments]:
        group = self.group
        flat = ids.reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(I32)
        sizes = _all_gather(group, jnp.bincount(flat, length=group.num_experts).astype(I32))
        capacity = group.capacity(ids.shape[0])
        sorted_weights = weights.reshape(-1)[order]
        origin = self._origin(sizes, capacity, flat.size)
        segments = Segments(order, sizes, sorted_weights, origin)
        rows = self._send(x[order // I32(group.top_k)], segments, capacity)
        return rows, self._at_rows(sorted_weights, segments), segments

    def combine(self, rows: Any, row_weights: Any, segments: Segments) -> Any:
        del row_weights  # applied by the owner of the tokens, who has them already
        returned = self._return(rows, segments)
        return self._sum_choices(segments.weights[:, None] * returned.astype(F32), segments, rows)

    def dispatch_grad(self, d_rows: Any, d_row_weights: Any, segments: Segments) -> tuple[Any, Any]:
        d_x = self._sum_choices(self._return(d_rows, segments).astype(F32), segments, d_rows)
        num_devices, num_choices = self.group.num_devices, segments.order.size
        unused = I32(num_devices * num_choices)
        slots = jnp.where(segments.origin >= 0, segments.origin, unused)
        per_choice = zeros_alike(d_row_weights, shape=(num_devices * num_choices,))
        per_choice = per_choice.at[slots].add(d_row_weights, mode="drop")
        own = _reduce_scatter(self.group, per_choice.reshape(num_devices, num_choices))
        d_weights = jnp.zeros_like(own).at[segments.order].set(own, unique_indices=True)
        return d_x, d_weights.reshape(-1, self.group.top_k)

    def combine_grad(
        self, d_y: Any, rows: Any, row_weights: Any, segments: Segments
    ) -> tuple[Any, Any]:
        d_token = d_y[segments.order // I32(self.group.top_k)]
        sent = self._send(d_token, segments, rows.shape[0]).astype(F32)
        d_row_weights = jnp.sum(sent * rows.astype(F32), axis=1)
        return (row_weights[:, None] * sent).astype(rows.dtype), d_row_weights

    def _rank(self) -> Any:
        return lax.axis_index(self.group.axis).astype(I32) if self.group.axis else I32(0)

    def _placement(self, sizes: Any) -> tuple[Any, Any]:
        """[R, E] where each segment starts among its source's choices and its target's rows."""
        num_devices, num_experts = sizes.shape
        at_source = jnp.cumsum(sizes, axis=1, dtype=I32) - sizes
        by_expert = sizes.T.reshape(num_devices, -1)  # [target, (local expert, source)]
        at_target = jnp.cumsum(by_expert, axis=1, dtype=I32) - by_expert
        return at_source, at_target.reshape(num_experts, num_devices).T

    def _origin(self, sizes: Any, capacity: int, num_choices: int) -> Any:
        """`Segments.origin` of this device."""
        num_devices, num_local = self.group.num_devices, self.group.num_local_experts
        at_source, _ = self._placement(sizes)

        def mine(a: Any) -> Any:  # [(local expert, source)]
            part = lax.dynamic_slice_in_dim(a, self._rank() * I32(num_local), num_local, axis=1)
            return part.T.reshape(-1)

        ends = jnp.cumsum(mine(sizes), dtype=I32)
        row = jnp.arange(capacity, dtype=I32)
        segment = jnp.searchsorted(ends, row, side="right").astype(I32)
        at = jnp.minimum(segment, I32(ends.size - 1))
        place = mine(at_source)[at] + row - (ends - mine(sizes))[at]
        origin = (at % I32(num_devices)) * I32(num_choices) + place
        return jnp.where(row < ends[-1], origin, I32(-1))

    def _at_rows(self, sorted_values: Any, segments: Segments) -> Any:
        """A number of each choice beside its row. Small: all devices get all of them."""
        everybody = _all_gather(self.group, sorted_values).reshape(-1)
        values = everybody[jnp.maximum(segments.origin, 0)]
        return jnp.where(segments.origin >= 0, values, jnp.zeros((), values.dtype))

    def _send(self, choices: Any, segments: Segments, capacity: int) -> Any:
        """Sorted choices [T * K, D] to the rows [C, D] of their experts."""
        sizes, num_local = segments.sizes, self.group.num_local_experts
        at_source, at_target = self._placement(sizes)
        out = zeros_alike(choices, shape=(capacity, choices.shape[1]))
        received = lax.dynamic_slice_in_dim(sizes, self._rank() * I32(num_local), num_local, axis=1)
        return self._exchange(
            choices, out, self._own(at_source), self._own(sizes), self._own(at_target),
            received.reshape(-1),
        )  # fmt: skip

    def _return(self, rows: Any, segments: Segments) -> Any:
        """The inverse of `_send`."""
        sizes, num_local = segments.sizes, self.group.num_local_experts
        at_source, at_target = self._placement(sizes)
        out = zeros_alike(rows, shape=(segments.order.size, rows.shape[1]))

        def mine(a: Any) -> Any:  # [(source, local expert)]
            start = self._rank() * I32(num_local)
            return lax.dynamic_slice_in_dim(a, start, num_local, axis=1).reshape(-1)

        return self._exchange(
            rows, out, mine(at_target), mine(sizes), mine(at_source), self._own(sizes)
        )

    def _own(self, a: Any) -> Any:
        return lax.dynamic_index_in_dim(a, self._rank(), keepdims=False)

    def _exchange(self, operand: Any, output: Any, *slices: Any) -> Any:
        if not self.group.axis:
            raise ValueError("lax.ragged_all_to_all needs a mesh axis, and there is one device")
        return lax.ragged_all_to_all(operand, output, *slices, axis_name=self.group.axis)

    def _sum_choices(self, terms: Any, segments: Segments, like: Any) -> Any:
        """Sum the sorted choices [T * K, D] of each token."""
        unsorted = jnp.zeros_like(segments.order).at[segments.order]
        place = unsorted.set(jnp.arange(segments.order.size, dtype=I32), unique_indices=True)
        by_token = terms[place].reshape(-1, self.group.top_k, terms.shape[1])
        return jnp.sum(by_token, axis=1).astype(like.dtype)


@functools.cache
def flags_without_one_shot() -> dict[str, bool]:
    """Flags with which XLA runs `lax.ragged_all_to_all` on a GPU by NCCL's sends and receives."""
    flags = {ONE_SHOT_FLAG: False}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={_FALLBACK_FLAG: True})
    except jax.errors.JaxRuntimeError:  # it has no such flag, and needs none
        return flags
    return flags | {_FALLBACK_FLAG: True}


@functools.cache
def why_not_ragged(mesh: jax.sharding.Mesh) -> str:
    """Why XLA cannot run `lax.ragged_all_to_all` on a mesh, in its words; empty if it can."""
    (axis,) = mesh.axis_names

    def send_all_to_first() -> Any:
        one = lax.pcast(jnp.ones(mesh.size, I32), axis, to="varying")
        first = one * (jnp.arange(mesh.size, dtype=I32) == 0).astype(I32)
        from_all = one * (lax.axis_index(axis) == 0).astype(I32)
        place = one * lax.axis_index(axis).astype(I32)
        return lax.ragged_all_to_all(
            one, one, jnp.zeros_like(one), first, place, from_all, axis_name=axis
        )

    spec = jax.sharding.PartitionSpec(axis)
    try:
        jax.jit(
            jax.shard_map(send_all_to_first, mesh=mesh, in_specs=(), out_specs=spec)
        ).lower().compile()
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return ""


def _all_gather(group: ExpertParallel, a: Any) -> Any:
    return lax.all_gather(a, group.axis) if group.axis else a[None]


def _reduce_scatter(group: ExpertParallel, a: Any) -> Any:
    """[R, ...] of each device to its own [...] of the sum."""
    return lax.psum_scatter(a, group.axis) if group.axis else a[0]
