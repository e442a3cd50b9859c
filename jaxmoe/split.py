"""`dispatch` and `combine` in two halves: a start sends, a done receives, other work lies between.

What a start returns is a pytree of arrays that its done needs; that data dependence is all that
ties the two together. On GPUs the low-latency kernels are really two launches, for calls of up to
`group.split_tokens` tokens. Everything else (more tokens, other transports, `max_pending=0`) has
one step: there the start does the whole call and its done hands over the results. The numbers are
the same to the bit in any case, and those of `jaxmoe.dispatch` and `jaxmoe.combine`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jaxtyping import Array, Float, Float32, Int32

from jaxmoe import _ffi, ops
from jaxmoe._vma import vary_alike
from jaxmoe.group import ExpertParallel
from jaxmoe.plan import Plan


@jax.tree_util.register_pytree_node_class
class Pending:
    """A call between its start and its done. A pytree of arrays, which may pass through loops and
    conditions; `group` is static.

    Attributes:
      operation: "dispatch" or "combine".
      group: the group of the call.
      token: what the kernels of the done go by; None if the start did the whole call.
      arrays: the operands of the call, or its results if there is no token.
    """

    def __init__(self, operation: str, group: ExpertParallel, token: Any, arrays: Any):
        self.operation, self.group = operation, group
        self.token, self.arrays = token, arrays
        self.received_in: list[Any] = []  # traces; shared by copies of this object

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.token, self.arrays), (self.operation, self.group)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Pending:
        return cls(*static, *children)

    def __repr__(self) -> str:
        state = "done by its start" if self.token is None else "under way"
        return f"Pending({self.operation}, {state}, {self.group!r})"


def dispatch_start(
    group: ExpertParallel,
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    *,
    site: str | None = None,
) -> Pending:
    """Send tokens; `dispatch_done` receives them. Together they are `jaxmoe.dispatch`.

    At most `group.max_pending` starts of a group, of either operation, may wait for their done at a
    time. XLA may begin independent calls in another order than that of the source; where that
    could be too many, let a start depend on an earlier done (`jaxmoe.between` does it).

    Differentiable as a pair: the gradient of the done is that of `jaxmoe.dispatch`, in one piece.

    Args:
      group, x, expert_ids, weights, site: as in `jaxmoe.dispatch`.

    Returns:
      A `Pending` for `dispatch_done`.

    Raises:
      ValueError: as `jaxmoe.dispatch`. jax.errors.JaxRuntimeError: at run time, if more calls are
        pending than the group has room for; it can then not be used any more.
    """
    ops._check_usable("dispatch_start", group)
    ops._check_tokens(group, x, expert_ids, weights)
    operands = vary_alike((x, expert_ids, weights), group.axis)
    site_id = ops._site_id(site)
    if not 0 < x.shape[0] <= group.split_tokens:
        return Pending("dispatch", group, None, ops._dispatch(group, site_id, *operands))
    token = _ffi.dispatch_start(group, site_id, *lax.stop_gradient(operands))
    return Pending("dispatch", group, token, operands)


def dispatch_done(
    group: ExpertParallel, pending: Pending, *, site: str | None = None
) -> tuple[Any, Float32[Array, " C"], Plan]:
    """Receive what `dispatch_start` and its counterparts on the other devices have sent.

    Args:
      group: the group of the start.
      pending: what the start returned; it can be received once.
      site: a name for the gradient's call, as in `jaxmoe.dispatch`.

    Returns:
      rows, row_weights and the plan, as `jaxmoe.dispatch`.

    Raises:
      ValueError: if `pending` is not of this group and operation, or was received before.
        jax.errors.JaxRuntimeError: the same where only the device can tell, or as
        `jaxmoe.dispatch`.
    """
    _check_pending("dispatch", group, pending)
    if pending.token is None:
        return pending.arrays
    return _dispatch_done(group, ops._site_id(site), pending.token, *pending.arrays)


def combine_start(
    group: ExpertParallel,
    expert_rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
    *,
    site: str | None = None,
) -> Pending:
    """Send the experts' rows back, summed for each token; `combine_done` receives them.

    Together they are `jaxmoe.combine`; limits and gradients are as in `dispatch_start`.

    Args:
      group, expert_rows, row_weights, plan, site: as in `jaxmoe.combine`.

    Returns:
      A `Pending` for `combine_done`.

    Raises:
      ValueError, jax.errors.JaxRuntimeError: as `dispatch_start`.
    """
    ops._check_usable("combine_start", group)
    ops._check_rows(group, expert_rows, row_weights, plan)
    operands = vary_alike((expert_rows, row_weights, plan), group.axis)
    site_id = ops._site_id(site)
    if not 0 < plan.row_map.shape[1] <= group.split_tokens:
        return Pending("combine", group, None, ops._combine(group, site_id, *operands))
    token = _ffi.combine_start(group, site_id, *lax.stop_gradient(operands))
    return Pending("combine", group, token, operands)


def combine_done(
    group: ExpertParallel, pending: Pending, *, site: str | None = None
) -> Float[Array, "T D"]:
    """Receive the sums of `combine_start` and its counterparts, and add them up.

    Args:
      group, pending, site: as in `dispatch_done`.

    Returns:
      y [T, D], as `jaxmoe.combine`.

    Raises:
      ValueError, jax.errors.JaxRuntimeError: as `dispatch_done`.
    """
    _check_pending("combine", group, pending)
    if pending.token is None:
        return pending.arrays
    return _combine_done(group, ops._site_id(site), pending.token, *pending.arrays)


def between(pending: Pending, work: Callable[..., Any], *args: Any) -> tuple[Pending, Any]:
    """Run `work(*args)` after the start that made `pending` and before its done.

    Without it XLA is free to run independent work before the start or after the done. Where the
    start did the whole call, there is nothing to gain and the order is left to XLA.

    Args:
      pending: what a start returned.
      work: any function of arrays, such as the shared experts or another micro-batch.
      args: its arguments.

    Returns:
      `pending`, for the done, and what `work` returned.
    """
    if pending.token is None:
        return pending, work(*args)
    token, args = lax.optimization_barrier((pending.token, args))
    token, result = lax.optimization_barrier((token, work(*args)))
    later = Pending(pending.operation, pending.group, token, pending.arrays)
    later.received_in = pending.received_in
    return later, result


# The pair's derivative belongs to the done, whose operands are those of the start. The start gives
# an integer only, of which there is no derivative.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch_done(
    group: ExpertParallel, site: int, token: Any, x: Any, expert_ids: Any, weights: Any
) -> Any:
    return _ffi.dispatch_done(group, site, token, x, expert_ids, weights)


def _dispatch_done_fwd(
    group: ExpertParallel, site: int, token: Any, x: Any, expert_ids: Any, weights: Any
) -> Any:
    ops._check_derivative(group)
    results = _dispatch_done(group, site, token, x, expert_ids, weights)
    return results, results[2]


def _dispatch_done_bwd(group: ExpertParallel, site: int, plan: Plan, cotangents: Any) -> Any:
    return None, *ops._dispatch_bwd(group, site, plan, cotangents)


_dispatch_done.defvjp(_dispatch_done_fwd, _dispatch_done_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine_done(
    group: ExpertParallel, site: int, token: Any, expert_rows: Any, row_weights: Any, plan: Any
) -> Any:
    return _ffi.combine_done(group, site, token, expert_rows, row_weights, plan)


def _combine_done_fwd(
    group: ExpertParallel, site: int, token: Any, expert_rows: Any, row_weights: Any, plan: Any
) -> Any:
    y = _combine_done(group, site, token, expert_rows, row_weights, plan)
    return y, (expert_rows, row_weights, plan)


def _combine_done_bwd(group: ExpertParallel, site: int, residuals: Any, d_y: Any) -> Any:
    return None, *ops._combine_bwd(group, site, residuals, d_y)


_combine_done.defvjp(_combine_done_fwd, _combine_done_bwd)


def _check_pending(operation: str, group: ExpertParallel, pending: Pending) -> None:
    name = f"{operation}_done"
    ops._check_usable(name, group)
    if not isinstance(pending, Pending):
        raise ValueError(
            f"{name}: pending must be what {operation}_start returned, got "
            f"{type(pending).__name__}."
        )
    if pending.operation != operation:
        raise ValueError(
            f"{name}: pending is of {pending.operation}_start. Pass it to {pending.operation}_done."
        )
    if pending.group is not group:
        raise ValueError(
            f"{name}: pending is of another group, {pending.group!r}, than {group!r}. Pass the "
            "group of its start."
        )
    trace = core.get_opaque_trace_state()
    if trace in pending.received_in:
        raise ValueError(
            f"{name}: pending was received before. Each start has one done: keep its results, or "
            "start again."
        )
    pending.received_in.append(trace)
