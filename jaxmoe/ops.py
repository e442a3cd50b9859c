"""`dispatch` and `combine`: per-device operations with gradients, for `jax.shard_map`."""

from __future__ import annotations

import functools
import zlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from jaxmoe import _ffi, reference
from jaxmoe._vma import vary_alike
from jaxmoe.group import ExpertParallel
from jaxmoe.plan import Plan
from jaxmoe.residuals import PLAN

_BACKENDS: dict[str, ModuleType] = {
    "xla": reference,
    "cpu": _ffi,
    "p2p": _ffi,
    "nvshmem": _ffi,
}


def dispatch(
    group: ExpertParallel,
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    *,
    site: str | None = None,
) -> tuple[Any, Float32[Array, " C"], Plan]:
    """Send every token to the devices of its experts.

    Row r of device d is `x[t]` of the source device s whose choice (s, t, k) is the r-th of all
    choices for d's experts in the order (local expert, s, t, k). The order is part of the
    contract: equal inputs give equal bits in every run and on every transport.

    If more than C = `group.capacity(T)` choices are addressed to a device, those are kept that
    come first in the order (k, t, s): higher-ranked choices of all tokens before lower-ranked
    ones, no source device favoured. `plan.num_dropped` counts the others; they contribute nothing
    to `combine`.

    With `wire_dtype` a row is what `jaxmoe.wire` makes of `x[t]`, in eight bits and back; also on
    the token's own device.

    Differentiable in `x` and `weights`, with an FP8 wire as if it rounded nothing; not with FP8
    rows. `vmap` runs the batch one after the other.

    Args:
      group: the expert-parallel group; its mesh is that of the enclosing `jax.shard_map`.
      x: [T, D] tokens of this device in `group.dtype`, T <= group.max_tokens and equal on all
        devices.
      expert_ids: [T, K] int32 experts of each token, best first; -1 is no expert. An id below -1 or
        >= num_experts is treated as -1 and counted in `plan.num_invalid`.
      weights: [T, K] float32, what `combine` multiplies each row with.
      site: a name for this call, the same on all devices. Calls in one program that do not depend
        on each other need different names when they stem from the same line of code; everybody
        else leaves it None.

    Returns:
      rows [C, D] in `group.dtype`, or with `rows_dtype` a `jaxmoe.QuantizedRows` of [C, D] values
      and [C, ceil(D / 128)] scales; zero from `plan.num_rows` on. row_weights [C] float32,
      likewise. The `Plan`.

    Raises:
      ValueError: at trace time for shapes, dtypes, meshes and closed groups, saying what was got
        and wanted. TypeError: a derivative with FP8 rows. jax.errors.JaxRuntimeError: at run time
        when a peer did not arrive within `group.timeout`.
    """
    _check_usable("dispatch", group)
    _check_tokens(group, x, expert_ids, weights)
    x, expert_ids, weights = vary_alike((x, expert_ids, weights), group.axis)
    return _dispatch(group, _site_id(site), x, expert_ids, weights)


def combine(
    group: ExpertParallel,
    expert_rows: Float[Array, "C D"],
    row_weights: Float32[Array, " C"],
    plan: Plan,
    *,
    site: str | None = None,
) -> Float[Array, "T D"]:
    """Bring the experts' rows back to their tokens: `y[t] = sum_k weights[t, k] * expert_rows[row
    of (t, k)]`.

    Summed in float32 in a fixed order (`jaxmoe.reference` writes it down), so the result is
    reproducible bit for bit. Choices that were dropped or have id -1 add nothing; rows from
    `plan.num_rows` on are not read. Differentiable in `expert_rows` and `row_weights`.

    Args:
      group: the group that made the plan.
      expert_rows: [C, D] what the experts made of `dispatch`'s rows, in `group.dtype`.
      row_weights: [C] float32, `dispatch`'s second result (or others, for other weights).
      plan: `dispatch`'s third result.
      site: as in `dispatch`.

    Returns:
      y [T, D] in `group.dtype`; zero for a token without experts.

    Raises:
      ValueError, jax.errors.JaxRuntimeError: as in `dispatch`.
    """
    _check_usable("combine", group)
    _check_rows(group, expert_rows, row_weights, plan)
    expert_rows, row_weights, plan = vary_alike((expert_rows, row_weights, plan), group.axis)
    return _combine(group, _site_id(site), expert_rows, row_weights, plan)


# Gradients. With G the 0/1 matrix that copies tokens to rows (`rows = G x`, kept choices only), g
# the one that copies the weights of choices (`row_weights = g w`) and S = diag(row_weights):
# dispatch:  d_x = G^T d_rows                 (an unweighted combine)     d_w = g^T d_row_weights
# combine:   y = G^T S e, hence d_e = S G d_y (a cached dispatch times the weights)
# d_row_weights[r] = <(G d_y)[r], e[r]>                          (a dot product per row) G and g
# depend on expert_ids only, which are integers and take no gradient. The plan, being their
# encoding, takes none either. With an FP8 wire rows = Q(G x), and the derivative of the rounding Q,
# which is zero almost everywhere, is taken to be one (the straight-through estimator of Bengio,
# Leonard and Courville 2013).


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(group: ExpertParallel, site: int, x: Any, expert_ids: Any, weights: Any) -> Any:
    return _BACKENDS[group.transport].dispatch(group, site, x, expert_ids, weights)


def _dispatch_fwd(group: ExpertParallel, site: int, x: Any, expert_ids: Any, weights: Any) -> Any:
    _check_derivative(group)
    with _ffi.differentiated():
        rows, row_weights, plan = _BACKENDS[group.transport].dispatch(
            group, site, x, expert_ids, weights
        )
    plan = checkpoint_name(plan, PLAN)
    return (rows, row_weights, plan), plan


def _dispatch_bwd(group: ExpertParallel, site: int, plan: Plan, cotangents: Any) -> Any:
    d_rows, d_row_weights, _ = cotangents
    d_x, d_weights = _BACKENDS[group.transport].dispatch_grad(
        group, site, d_rows, d_row_weights, plan
    )
    return d_x, None, d_weights


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine(
    group: ExpertParallel, site: int, expert_rows: Any, row_weights: Any, plan: Any
) -> Any:
    return _BACKENDS[group.transport].combine(group, site, expert_rows, row_weights, plan)


def _combine_fwd(
    group: ExpertParallel, site: int, expert_rows: Any, row_weights: Any, plan: Any
) -> Any:
    with _ffi.differentiated():
        y = _BACKENDS[group.transport].combine(group, site, expert_rows, row_weights, plan)
    return y, (expert_rows, row_weights, plan)


def _combine_bwd(group: ExpertParallel, site: int, residuals: Any, d_y: Any) -> Any:
    expert_rows, row_weights, plan = residuals
    d_rows, d_row_weights = _BACKENDS[group.transport].combine_grad(
        group, site, d_y, expert_rows, row_weights, plan
    )
    return d_rows, d_row_weights, None


_combine.defvjp(_combine_fwd, _combine_bwd)


def _site_id(site: str | None) -> int:
    """A number for a call that is the same in every process and, mostly, different for different
    calls.

    Devices pair their calls by it. Without a name it is made from the lines of code that lead
    here, which, unlike a counter, does not depend on what else a process has traced before.
    """
    if site is None:
        site = _caller_lines()
    return zlib.crc32(site.encode())


def _caller_lines() -> str:
    import sys

    frame, lines = sys._getframe(3), []
    while frame is not None:
        code = frame.f_code
        lines.append(f"{code.co_name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return "\n".join(lines)


def _check_usable(op: str, group: ExpertParallel) -> None:
    if not isinstance(group, ExpertParallel):
        raise ValueError(
            f"{op}: the first argument must be an ExpertParallel, got {type(group).__name__}."
        )
    if group.closed:
        raise ValueError(f"{op}: {group!r} was closed. Make a new group.")
    if group.mesh is None:
        return
    current = jax.sharding.get_abstract_mesh()
    sizes = dict(group.spec.axis_sizes)
    if dict(current.shape) != sizes:
        where = (
            f"the mesh here is {dict(current.shape)}" if current.shape else "there is no mesh here"
        )
        raise ValueError(
            f"{op}: the group belongs to a mesh of axes {sizes}, but {where}. Call it inside "
            f"jax.shard_map over "
            "group.mesh, or make the group with the mesh that you use."
        )
    loose = [a for a in sizes if a not in current.manual_axes and (sizes[a] > 1 or a in group.axis)]
    if loose:
        raise ValueError(
            f"{op}: must run inside a jax.shard_map that is manual over every axis of the "
            f"group's mesh; here {loose} "
            "are not. Wrap the call in jax.shard_map(..., mesh=group.mesh) and leave axis_names "
            "at its default."
        )


def _check_derivative(group: ExpertParallel) -> None:
    if group.rows_dtype is not None:
        raise TypeError(
            f"dispatch: asked for a derivative, but rows_dtype is {group.rows_dtype.name}, in "
            "which gradients are not computed. Make the group without rows_dtype to train, or stop "
            "the gradient before dispatch."
        )


def _check_array(op: str, name: str, a: Any, shape: tuple[int | str, ...], dtype: Any) -> None:
    got = tuple(jnp.shape(a))
    fits = len(got) == len(shape) and all(
        isinstance(want, str) or g == want for g, want in zip(got, shape, strict=True)
    )
    if not fits:
        want = ", ".join(map(str, shape))
        raise ValueError(f"{op}: {name} must have shape [{want}], got {list(got)}.")
    if jnp.result_type(a) != jnp.dtype(dtype):
        raise ValueError(
            f"{op}: {name} must be {jnp.dtype(dtype).name}, got {jnp.result_type(a).name}. Cast "
            f"it with "
            f"{name}.astype(jnp.{jnp.dtype(dtype).name})"
            + (", or make the group with that dtype." if name in ("x", "expert_rows") else ".")
        )


def _check_tokens(group: ExpertParallel, x: Any, expert_ids: Any, weights: Any) -> None:
    _check_array("dispatch", "x", x, ("T", group.dim), group.dtype)
    num_tokens = x.shape[0]
    _check_array("dispatch", "expert_ids", expert_ids, (num_tokens, group.top_k), jnp.int32)
    _check_array("dispatch", "weights", weights, (num_tokens, group.top_k), jnp.float32)
    if num_tokens > group.max_tokens:
        raise ValueError(
            f"dispatch: got {num_tokens} tokens per device, but the group was made with max_tokens="
            f"{group.max_tokens}. Make the group with more, or call with the batch in parts."
        )


def _check_rows(group: ExpertParallel, expert_rows: Any, row_weights: Any, plan: Any) -> None:
    if not isinstance(plan, Plan):
        raise ValueError(
            f"combine: plan must be the Plan that dispatch returned, got {type(plan).__name__}."
        )
    num_devices, num_tokens, top_k = plan.row_map.shape
    if (num_devices, top_k) != (group.num_devices, group.top_k):
        raise ValueError(
            f"combine: the plan is of a group with {num_devices} devices and top_k={top_k}, this "
            f"group has "
            f"{group.num_devices} and {group.top_k}. Pass the group that made the plan."
        )
    rows = group.capacity(num_tokens)
    _check_array("combine", "expert_rows", expert_rows, (rows, group.dim), group.dtype)
    _check_array("combine", "row_weights", row_weights, (rows,), jnp.float32)
