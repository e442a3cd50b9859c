"""The experts' computation: SwiGLU over rows that are grouped by expert.

Two backends. "blocked" walks over blocks of rows that belong to one expert, in a loop whose length
depends on the data, so that work and memory follow the rows in use and not the capacity.
"ragged_dot" is `jax.lax.ragged_dot`, which XLA lowers on the host to a dense product over all
experts, L times the work, and which is slow on GPUs: one H200, jax 0.11.2, 131,000 rows of 2048 for
32 experts of 1024, forward: 92 ms, against 6 ms in blocks of 2048 rows
(benchmarks/results/2026-11-22-experts-H200.txt).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxmoe._vma import vary_alike, zeros_alike
from jaxmoe.quantized import QuantizedExperts, matmul

BACKENDS = ("auto", "blocked", "ragged_dot")
I32, F32 = jnp.int32, jnp.float32


def swiglu(
    rows: Float[Array, "C D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "C D"]:
    """`(silu(rows @ gate) * (rows @ up)) @ down`: one expert for all rows (Shazeer 2020)."""
    return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down


def swiglu_experts(
    rows: Float[Array, "C D"],
    group_sizes: Int32[Array, " L"],
    gate: Float[Array, "L D F"] | QuantizedExperts,
    up: Float[Array, "U D F"] | Float[Array, "D F"] | QuantizedExperts,
    down: Float[Array, "L F D"] | QuantizedExperts,
    *,
    block_rows: int = 128,
    backend: str = "auto",
) -> Float[Array, "C D"]:
    """SwiGLU of every row with its own expert; rows past the last group come out as zeros.

    Args:
      rows: [C, D] rows in the order of the experts.
      group_sizes: [L] rows of each expert; rows past their sum belong to nobody.
      gate, up, down: the experts' weights in the dtype of `rows`. An `up` of [1, D, F] or [D, F] is
        one that all experts share; its gradient is the sum over them. `QuantizedExperts` are for
        the forward pass of the "blocked" backend: each step reads the eight-bit values of one
        expert, and no wider copy of all is ever made.
      block_rows: rows per step of the "blocked" backend; about the rows of a typical expert.
      backend: "blocked", "ragged_dot" or "auto" (blocked on CPUs and GPUs, ragged_dot elsewhere).

    Returns:
      [C, D] in the dtype of `rows`.

    Raises:
      ValueError: weights of other sizes, or quantised ones with "ragged_dot".
      TypeError: a derivative with quantised weights.
    """
    if backend not in BACKENDS:
        raise ValueError(f"swiglu_experts: backend must be one of {BACKENDS}, got {backend!r}.")
    up = up[None] if not isinstance(up, QuantizedExperts) and up.ndim == 2 else up
    _check_weights(rows, group_sizes, gate, up, down)
    if rows.shape[0] == 0:
        return rows
    quantized = any(isinstance(w, QuantizedExperts) for w in (gate, up, down))
    if quantized and backend == "ragged_dot":
        raise ValueError(
            "swiglu_experts: backend 'ragged_dot' takes no quantised weights. Use 'blocked' or "
            "'auto', or `QuantizedExperts.dequantize`."
        )
    if quantized:
        operands = vary_alike((rows, group_sizes, gate, up, down))
        return _quantized(min(block_rows, rows.shape[0]), *operands)
    if backend == "auto":
        backend = "blocked" if jax.default_backend() in ("cpu", "gpu") else "ragged_dot"
    operands = vary_alike((rows, group_sizes, gate, up, down))
    if backend == "ragged_dot":
        return _ragged(*operands)
    return _blocked(min(block_rows, rows.shape[0]), *operands)


def _check_weights(rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> None:
    experts, dim, hidden = group_sizes.shape[0], rows.shape[1], gate.shape[-1]
    shapes = {"gate": (gate, dim, hidden), "up": (up, dim, hidden), "down": (down, hidden, dim)}
    for name, (weight, *matrix) in shapes.items():
        shared = name == "up" and weight.shape == (1, *matrix)
        if weight.shape != (experts, *matrix) and not shared:
            more = f" or {[1, *matrix]} (shared)" if name == "up" else ""
            raise ValueError(
                f"swiglu_experts: {name} has shape {list(weight.shape)}, wanted "
                f"{[experts, *matrix]}{more}: rows are {list(rows.shape)} and group_sizes "
                f"{list(group_sizes.shape)}. Pass this device's experts."
            )


def _ragged(rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    dot = functools.partial(lax.ragged_dot, group_sizes=group_sizes)
    # Of the rows that belong to nobody, the gate's product is zero, whatever the shared one is.
    shared = up.shape[0] == 1
    hidden = jax.nn.silu(dot(rows, gate)) * (rows @ up[0] if shared else dot(rows, up))
    return dot(hidden, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block: int, rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    return _walk(swiglu, block, rows, group_sizes, gate, up, down)


def _walk(function: Any, block: int, rows: Any, group_sizes: Any, *weights: Any) -> Any:
    """`function(rows, *weights of one expert)` of all blocks."""
    blocks = _Blocks(group_sizes, rows.shape[0], block)

    def step(carry: Any) -> Any:
        i, out = carry
        expert, start, used = blocks.at(i)
        new = function(_slice(rows, start, block), *(_of(expert, w) for w in weights))
        return i + 1, _update(out, new, start, used)

    first = (zeros_alike(blocks.count), zeros_alike(rows))
    return lax.while_loop(lambda carry: carry[0] < blocks.count, step, first)[1]


def _blocked_fwd(block: int, rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    out = _blocked(block, rows, group_sizes, gate, up, down)
    return out, (rows, group_sizes, gate, up, down)


def _blocked_bwd(block: int, residuals: Any, d_out: Any) -> Any:
    """Per block, with a = x G, b = x U, h = silu(a) b and y = h D:

    d_h = d_y D^T,  d_b = d_h silu(a),  d_a = d_h b silu'(a),
    d_x = d_a G^T + d_b U^T,  d_G += x^T d_a,  d_U += x^T d_b,  d_D += h^T d_y.

    a and b are computed again rather than kept: they would be as large as the capacity. Weight
    gradients add up in float32.
    """
    rows, group_sizes, *weights = residuals
    blocks = _Blocks(group_sizes, rows.shape[0], block)

    def step(carry: Any) -> Any:
        i, d_rows, totals = carry
        expert, start, used = blocks.at(i)
        x = jnp.where(used, _slice(rows, start, block), jnp.zeros((), rows.dtype))
        d_y = jnp.where(used, _slice(d_out, start, block), jnp.zeros((), d_out.dtype))
        _, vjp = jax.vjp(swiglu, x, *(_of(expert, w) for w in weights))
        d_x, *d_block = vjp(d_y)
        totals = [
            t.at[_row(expert, t)].add(d.astype(F32)) for t, d in zip(totals, d_block, strict=True)
        ]
        return i + 1, _update(d_rows, d_x, start, used), totals

    first = (
        zeros_alike(blocks.count),
        zeros_alike(d_out),
        [zeros_alike(w, F32) for w in weights],
    )
    _, d_rows, totals = lax.while_loop(lambda carry: carry[0] < blocks.count, step, first)
    return d_rows, None, *(t.astype(w.dtype) for t, w in zip(totals, weights, strict=True))


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized(block: int, rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    return _walk(_quantized_swiglu, block, rows, group_sizes, gate, up, down)


def _quantized_swiglu(rows: Any, gate: Any, up: Any, down: Any) -> Any:
    hidden = jax.nn.silu(matmul(rows, gate)) * matmul(rows, up)
    return matmul(hidden.astype(rows.dtype), down).astype(rows.dtype)


def _quantized_fwd(block: int, *operands: Any) -> Any:
    dtypes = sorted({str(w.dtype) for w in operands[2:] if isinstance(w, QuantizedExperts)})
    raise TypeError(
        f"swiglu_experts: asked for a derivative, but the weights are quantised "
        f"({', '.join(dtypes)}) and have none. Train with the float weights, and quantise the "
        "result; or stop the gradient before this layer."
    )


def _quantized_bwd(block: int, residuals: Any, d_out: Any) -> Any:
    raise NotImplementedError


_quantized.defvjp(_quantized_fwd, _quantized_bwd)


def _row(expert: jax.Array, stack: Any) -> Any:
    """Where the expert's part of a stack is: in the only row, where all share one."""
    return 0 if stack.shape[0] == 1 else expert


def _of(expert: jax.Array, weights: Any) -> Any:
    """One expert's part of a stack, be it an array or `QuantizedExperts`.

    Eight-bit floats are sliced as integers: XLA's CPU backend would widen the whole stack to slice
    it. It still copies their bits once a call, outside the loop.
    """

    def part(a: Any) -> Any:
        if a.dtype != jnp.float8_e4m3fn:
            return a[_row(expert, a)]
        bits = lax.bitcast_convert_type(a, jnp.int8)
        return lax.bitcast_convert_type(bits[_row(expert, a)], a.dtype)

    return jax.tree.map(part, weights)


class _Blocks:
    """Blocks of at most `size` consecutive rows of one expert, in the order of the rows."""

    def __init__(self, group_sizes: jax.Array, capacity: int, size: int):
        ends = jnp.cumsum(group_sizes, dtype=I32)
        per_expert = (group_sizes + I32(size - 1)) // I32(size)
        last = jnp.cumsum(per_expert, dtype=I32)
        index = jnp.arange(capacity // size + group_sizes.shape[0], dtype=I32)
        expert = jnp.searchsorted(last, index, side="right").astype(I32)
        self._expert = jnp.minimum(expert, I32(group_sizes.shape[0] - 1))
        nth = index - (last - per_expert)[self._expert]
        self._start = (ends - group_sizes)[self._expert] + nth * I32(size)
        self._end = ends[self._expert]
        self._last_start = capacity - size
        self._size = size
        self.count = last[-1]

    def at(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Expert of block i, the first row to slice, and which of the sliced rows are the block's.

        A slice that would run past the buffer is moved back, so it may begin before the block does.
        """
        start = jnp.minimum(self._start[i], I32(self._last_start))
        row = start + jnp.arange(self._size, dtype=I32)
        used = (row >= self._start[i]) & (row < self._end[i])
        return self._expert[i], start, used[:, None]


def _slice(a: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, start, size)


def _update(a: jax.Array, new: jax.Array, start: jax.Array, used: jax.Array) -> jax.Array:
    kept = jnp.where(used, new, _slice(a, start, new.shape[0]))
    return lax.dynamic_update_slice_in_dim(a, kept, start, 0)
