"""The experts' computation: SwiGLU over rows that are grouped by expert.

Backends as for `jaxmoe.grouped_matmul`. "cuda" computes gate, up and SwiGLU in one product.
"blocked" walks over blocks of rows that belong to one expert, in a loop whose length depends on the
data, so that work and memory follow the rows in use and not the capacity. "ragged_dot" is
`jax.lax.ragged_dot`, which XLA lowers on the host to a dense product over all experts, L times the
work, and which is slow on GPUs: one H200, jax 0.11.2, 131,000 rows of 2048 for 32 experts of 1024,
forward: 92 ms, against 6 ms in blocks of 2048 rows
(benchmarks/results/2026-11-22-experts-H200.txt). "batched" is one batched product for experts with
few rows each, for decoding on GPUs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from jaxmoe._vma import vary_alike, zeros_alike
from jaxmoe.block_quantized import BlockQuantizedExperts
from jaxmoe.products import batched, choose_backend, cuda, fp8_swiglu, grouped_matmul
from jaxmoe.products.blocks import Blocks
from jaxmoe.quantized import QuantizedExperts, matmul
from jaxmoe.residuals import GATE, UP
from jaxmoe.wire import QuantizedRows

F32 = jnp.float32


def swiglu(
    rows: Float[Array, "C D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "C D"]:
    """`(silu(rows @ gate) * (rows @ up)) @ down`: one expert for all rows (Shazeer 2020)."""
    return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down


def swiglu_experts(
    rows: Float[Array, "C D"] | QuantizedRows,
    group_sizes: Int32[Array, " L"],
    gate: Float[Array, "L D F"] | QuantizedExperts | BlockQuantizedExperts,
    up: Float[Array, "U D F"] | Float[Array, "D F"] | QuantizedExperts | BlockQuantizedExperts,
    down: Float[Array, "L F D"] | QuantizedExperts | BlockQuantizedExperts,
    *,
    block_rows: int = 128,
    backend: str = "auto",
    max_rows: int | None = None,
) -> Float[Array, "C D"]:
    """SwiGLU of every row with its own expert; rows past the last group come out as zeros.

    With weights in FP8 (`jaxmoe.quantize_blocks`) all three products are those of FP8 tensor cores
    (`jaxmoe.grouped_matmul`): rows are quantised unless they come as `QuantizedRows`, and so are
    the hidden ones; SwiGLU is computed in float32. Gradients are those of the computation in
    floats, with the master weights, at the hidden values that the FP8 products gave.

    Args:
      rows: [C, D] rows in the order of the experts; `QuantizedRows` with weights in FP8.
      group_sizes: [L] rows of each expert; rows past their sum belong to nobody.
      gate, up, down: the experts' weights in the dtype of `rows`. An `up` of [1, D, F] or [D, F] is
        one that all experts share; its gradient is the sum over them. `QuantizedExperts` are for
        the forward pass of the "blocked" backend: each step reads the eight-bit values of one
        expert, and no wider copy of all is ever made. `BlockQuantizedExperts`, all three or none,
        are for the "cuda" and "blocked" backends, with gradients if they keep master weights.
      block_rows: rows per step of the "blocked" backend; about the rows of a typical expert.
      backend: "cuda", "tokamax", "blocked", "ragged_dot" or "auto", as for
        `jaxmoe.grouped_matmul`. Except for "blocked" and "batched", the gradient keeps rows @ gate
        and rows @ up, with names for policies of `jax.checkpoint` (`jaxmoe.residuals`). Also
        "batched", which "auto" never is here, but in the layer.
      max_rows: the most rows that an expert can have, for the "batched" backend: if one has more,
        all rows come out as NaN.

    Returns:
      [C, D] in the dtype of `rows`; bfloat16 for `QuantizedRows`.

    Raises:
      ValueError: weights of other sizes, of FP8 and other kinds mixed; quantised ones with a
        backend that does not take them, a shared up projection of floats with "cuda"; "batched"
        without max_rows.
      RuntimeError: "cuda" or "tokamax" where it cannot run.
      TypeError: a derivative with quantised weights, but for FP8 with master weights.
    """
    if not isinstance(up, QuantizedExperts | BlockQuantizedExperts) and up.ndim == 2:
        up = up[None]
    if isinstance(rows, QuantizedRows) or fp8_swiglu.concerns(gate, up, down):
        _check_weights(rows, group_sizes, gate, up, down)
        return fp8_swiglu.swiglu(
            rows, group_sizes, gate, up, down, backend=backend, block_rows=block_rows
        )
    quantized = any(isinstance(w, QuantizedExperts) for w in (gate, up, down))
    plain = not quantized and up.shape == gate.shape
    if backend == "cuda" and not plain:
        raise ValueError(
            "swiglu_experts: backend 'cuda' takes neither quantised weights nor a shared up "
            "projection. Use 'blocked' or 'auto'."
        )
    if backend == "batched" and (quantized or max_rows is None or max_rows < 1):
        raise ValueError(
            "swiglu_experts: backend 'batched' needs max_rows of at least 1, the most rows of an "
            f"expert (got {max_rows}), and takes no quantised weights. Use 'blocked' or 'auto'."
        )
    if quantized and backend in ("ragged_dot", "tokamax"):
        raise ValueError(
            f"swiglu_experts: backend {backend!r} takes no quantised weights. Use 'blocked' or "
            "'auto', or `QuantizedExperts.dequantize`."
        )
    if backend != "batched":
        backend = choose_backend(backend, rows.dtype, gate.shape[1:]).backend
    _check_weights(rows, group_sizes, gate, up, down)
    if rows.shape[0] == 0:
        return rows
    if quantized:
        operands = vary_alike((rows, group_sizes, gate, up, down))
        return _quantized(min(block_rows, rows.shape[0]), *operands)
    operands = vary_alike((rows, group_sizes, gate, up, down))
    if backend == "batched":
        return batched.swiglu(*operands, max_rows=max_rows or 1)
    if backend == "cuda" and plain:
        return _fused(*operands)
    if backend in ("ragged_dot", "tokamax"):
        return _separate((backend, block_rows), *operands)
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


@jax.custom_vjp
def _fused(rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    hidden = cuda.swiglu(rows, gate, up, group_sizes, save=False)[0]
    return cuda.forward(hidden, down, group_sizes)


def _fused_fwd(rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    hidden, a, b = cuda.swiglu(rows, gate, up, group_sizes, save=True)
    a, b = checkpoint_name(a, GATE), checkpoint_name(b, UP)
    return cuda.forward(hidden, down, group_sizes), (rows, group_sizes, gate, up, down, a, b)


def _fused_bwd(residuals: Any, d_y: Any) -> Any:
    """As for `_blocked_bwd`, with all rows at once; h is computed again from a and b."""
    rows, group_sizes, gate, up, down, a, b = residuals
    hidden, vjp = jax.vjp(lambda a, b: fp8_swiglu.activate(a, b).astype(rows.dtype), a, b)
    d_a, d_b = vjp(cuda.input_grad(d_y, down, group_sizes))
    d_rows = cuda.input_grad_of_two(d_a, gate, d_b, up, group_sizes)
    d_gate = cuda.weight_grad(rows, d_a, group_sizes)
    d_up = cuda.weight_grad(rows, d_b, group_sizes)
    return d_rows, None, d_gate, d_up, cuda.weight_grad(hidden, d_y, group_sizes)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _separate(
    how: tuple[str, int], rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any
) -> Any:
    """One grouped product after the other."""
    backend, block = how

    def dot(x: Any, w: Any) -> jax.Array:
        return grouped_matmul(x, w, group_sizes, backend=backend, block_rows=block)

    # Of the rows that belong to nobody, the gate's product is zero, whatever the shared one is.
    a, b = dot(rows, gate), rows @ up[0] if up.shape[0] == 1 else dot(rows, up)
    a, b = checkpoint_name(a, GATE), checkpoint_name(b, UP)
    return dot(jax.nn.silu(a) * b, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block: int, rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    return _walk(swiglu, block, rows, group_sizes, gate, up, down)


def _walk(function: Any, block: int, rows: Any, group_sizes: Any, *weights: Any) -> Any:
    """`function(rows, *weights of one expert)` of all blocks."""
    blocks = Blocks(group_sizes, rows.shape[0], block)

    def step(out: Any, expert: Any, start: Any, used: Any) -> Any:
        new = function(blocks.read(rows, start), *(_of(expert, w) for w in weights))
        return blocks.write(out, new, start, used)

    return blocks.fold(step, zeros_alike(rows))


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
    blocks = Blocks(group_sizes, rows.shape[0], block)

    def step(state: Any, expert: Any, start: Any, used: Any) -> Any:
        d_rows, totals = state
        x, d_y = blocks.read_used(rows, start, used), blocks.read_used(d_out, start, used)
        _, vjp = jax.vjp(swiglu, x, *(_of(expert, w) for w in weights))
        d_x, *d_block = vjp(d_y)
        totals = [
            t.at[_row(expert, t)].add(d.astype(F32)) for t, d in zip(totals, d_block, strict=True)
        ]
        return blocks.write(d_rows, d_x, start, used), totals

    first = (zeros_alike(d_out), [zeros_alike(w, F32) for w in weights])
    d_rows, totals = blocks.fold(step, first)
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
