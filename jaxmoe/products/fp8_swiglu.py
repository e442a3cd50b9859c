"""SwiGLU of experts in FP8: three products of `jaxmoe.products.fp8`, and what lies between.

The definition, with Q the quantisation of rows in blocks of 128 (`quantize_rows`) and every product
rounded once to bfloat16:

    a = Q(x) gate,  b = Q(x) up,  h = bf16(silu(a) b), in float32,  y = Q(h) down

Rows that come as `QuantizedRows` are Q(x). The hidden rows are rounded to bfloat16 first, which
halves what is written and read for Q and adds 2^-9 to its 2^-4.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmoe._vma import vary_alike, zeros_alike
from jaxmoe.block_quantized import BlockQuantizedExperts
from jaxmoe.products import blocked, cuda, fp8
from jaxmoe.residuals import GATE, UP
from jaxmoe.wire import QuantizedRows

F32, BF16 = jnp.float32, jnp.bfloat16
_FLOATS = (BF16, jnp.float16, F32)


def concerns(*weights: Any) -> bool:
    """Whether some of these weights are for `swiglu` here."""
    return any(isinstance(w, BlockQuantizedExperts) for w in weights)


def swiglu(
    rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any, *, backend: str, block_rows: int
) -> jax.Array:
    """`swiglu_experts` of weights in FP8, whose shapes have been checked."""
    _check_kinds(rows, gate, up, down)
    dtype = BF16 if isinstance(rows, QuantizedRows) else rows.dtype
    picked = choose_backend(backend, dtype, gate.shape[1:])
    if 0 in (*rows.shape, *gate.shape):
        return zeros_alike(group_sizes, dtype, rows.shape)
    operands = vary_alike((rows, group_sizes, gate, up, down))
    return _swiglu((picked, min(block_rows, rows.shape[0])), *operands)


def choose_backend(
    backend: str, dtype: Any, widths: tuple[int, ...], device: jax.Device | None = None
) -> str:
    """One backend for products from D to F and back, `widths`; see `fp8.choose_backend`."""
    picked = {fp8.choose_backend(backend, dtype, w, device) for w in (widths, widths[::-1])}
    return "blocked" if "blocked" in picked else "cuda"


def _check_kinds(rows: Any, gate: Any, up: Any, down: Any) -> None:
    weights = {"gate": gate, "up": up, "down": down}
    others = {k: w for k, w in weights.items() if not isinstance(w, BlockQuantizedExperts)}
    if others:
        kinds = ", ".join(f"{k} {type(w).__name__} of {w.dtype}" for k, w in others.items())
        why = "the other weights" if len(others) < len(weights) else "the rows (`QuantizedRows`)"
        raise ValueError(
            f"swiglu_experts: {why} are in FP8 with scales for blocks, but {kinds}. Quantise all "
            "three float weights with `jaxmoe.quantize_blocks`, or pass floats "
            "(`.dequantize(dtype)`)."
        )
    if not isinstance(rows, QuantizedRows) and rows.dtype not in _FLOATS:
        raise ValueError(
            f"swiglu_experts: rows must be `QuantizedRows` or floats of at least 16 bits, got "
            f"{rows.dtype}. Make rows of FP8 by `dispatch` with rows_dtype."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(
    how: tuple[str, int], rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any
) -> Any:
    return _forward(how, rows, group_sizes, gate, up, down)[0]


def _forward(
    how: tuple[str, int], rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any
) -> Any:
    """y, and the products a and b."""
    quantized = rows if isinstance(rows, QuantizedRows) else fp8.quantize_rows(rows)
    a = fp8.forward(how, quantized, gate, group_sizes)
    b = fp8.forward(how, quantized, up, _sizes_of(up, group_sizes))
    hidden = fp8.quantize_rows(activate(a, b).astype(BF16))
    y = fp8.forward(how, hidden, down, group_sizes)
    return y.astype(BF16 if quantized is rows else rows.dtype), a, b


def activate(a: Any, b: Any) -> Any:
    """SwiGLU of two products in float32, as kernels do it: rounded once."""
    return jax.nn.silu(a.astype(F32)) * b.astype(F32)


def _sizes_of(weight: Any, group_sizes: Any) -> Any:
    """The groups of a weight's products: one, where all experts share it."""
    if weight.shape[0] == group_sizes.shape[0]:
        return group_sizes
    return jnp.sum(group_sizes, keepdims=True, dtype=group_sizes.dtype)


def _swiglu_fwd(
    how: tuple[str, int], rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any
) -> Any:
    missing = [name for name, w in (("gate", gate), ("up", up), ("down", down)) if w.master is None]
    if missing:
        raise TypeError(
            f"swiglu_experts: asked for a derivative, but {', '.join(missing)} are in FP8 and have "
            "none. Quantise all three with `quantize_blocks(w, keep_master=True)`, or stop the "
            "gradient before this layer."
        )
    y, a, b = _forward(how, rows, group_sizes, gate, up, down)
    a, b = checkpoint_name(a, GATE), checkpoint_name(b, UP)
    return y, (rows, group_sizes, gate, up, down, a, b)


def _swiglu_bwd(how: tuple[str, int], residuals: Any, d_y: Any) -> Any:
    """As for `_fused_bwd` of `jaxmoe.experts`, as though nothing had been rounded: at the a and b
    of the products in FP8, with the master weights, the float rows, or else the dequantised ones,
    and the hidden rows before Q, all in the dtype of d_y.

    FP8 rows have no gradient.
    """
    backend, block = how
    rows, group_sizes, *weights, a, b = residuals
    module: Any = cuda if backend == "cuda" else blocked.Blocked(block)
    gate, up, down = (w.master.astype(d_y.dtype) for w in weights)
    of_up = _sizes_of(up, group_sizes)
    hidden, vjp = jax.vjp(lambda a, b: activate(a, b).astype(d_y.dtype), a, b)
    d_a, d_b = (d.astype(d_y.dtype) for d in vjp(module.input_grad(d_y, down, group_sizes)))
    d_rows = None
    if isinstance(rows, QuantizedRows):
        x = rows.dequantize(d_y.dtype)
    else:
        x = rows
        d_rows = (
            cuda.input_grad_of_two(d_a, gate, d_b, up, group_sizes)
            if backend == "cuda" and of_up is group_sizes
            else module.input_grad(d_a, gate, group_sizes) + module.input_grad(d_b, up, of_up)
        )
    d_weights = (
        module.weight_grad(x, d_a, group_sizes),
        module.weight_grad(x, d_b, of_up),
        module.weight_grad(hidden, d_y, group_sizes),
    )
    return d_rows, None, *map(fp8.cotangent, weights, d_weights)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
