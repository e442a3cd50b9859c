"""Grouped products of FP8: e4m3 rows with a scale for each 128 of their numbers, and weights with
one for each 128 x 128.

The definition, for row r of group g and with b running over blocks of 128 of the contraction:

    y[r, f] = sum_b (x_scale[r, b] * w_scale[g, f // 128, b]) * sum_{d in b} x[r, d] * w[g, f, d]

with values and scales exactly as they are given, every operation in float32, and the result rounded
once to bfloat16. Tensor cores keep fewer bits than float32 within an inner sum; the outer one is
ordinary float32 arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe import _ffi, wire
from jaxmoe._vma import vary_alike, zeros_alike
from jaxmoe.block_quantized import BLOCK, BlockQuantizedExperts
from jaxmoe.products import blocked, cuda
from jaxmoe.products.blocks import Blocks

F32, BF16 = jnp.float32, jnp.bfloat16
BACKENDS = ("auto", "cuda", "blocked")
_DIM_MULTIPLE = 16  # numbers: the copy engine addresses rows by 16 bytes


def quantize_rows(x: jax.Array) -> wire.QuantizedRows:
    """Float rows as `dispatch` hands them over (scale rule "amax")."""
    return wire.hand_over(*wire.quantize(x, "amax"))


def matmul(x: Any, w: Any, group_sizes: Any, backend: str, block_rows: int) -> Any:
    """`jaxmoe.grouped_matmul` where x or w is quantised."""
    _check(x, w, group_sizes)
    dtype = BF16 if isinstance(x, wire.QuantizedRows) else x.dtype
    picked = choose_backend(backend, dtype, w.shape[1:])
    if 0 in (*x.shape, *w.shape):
        return zeros_alike(group_sizes, dtype, (x.shape[0], w.shape[2]))
    return _product((picked, min(block_rows, x.shape[0])), *vary_alike((x, w, group_sizes)))


def choose_backend(
    backend: str, dtype: Any, widths: tuple[int, ...], device: jax.Device | None = None
) -> str:
    """The backend: "auto" is "cuda" where that runs, else "blocked". `dtype` is that of float rows,
    or bfloat16.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"grouped_matmul: backend for FP8 operands must be one of {BACKENDS}, got {backend!r}."
        )
    if backend == "blocked":
        return backend
    reason = cuda.why_not(jnp.dtype(dtype), widths, device or jax.local_devices()[0])
    if not reason and widths[0] % _DIM_MULTIPLE:
        reason = f"its FP8 kernel needs rows of a multiple of {_DIM_MULTIPLE}, got {widths[0]}"
    if backend == "cuda" and reason:
        raise RuntimeError(f"grouped_matmul: backend 'cuda' cannot run here: {reason}.")
    return "blocked" if reason else "cuda"


def forward(
    how: tuple[str, int], rows: wire.QuantizedRows, w: BlockQuantizedExperts, group_sizes: Any
) -> jax.Array:
    """The definition by a backend, with its rows per step, in bfloat16; no derivative."""
    backend, block = how
    if backend == "cuda":
        return _ffi.grouped_fp8(rows, w.values, w.scales, group_sizes)
    return _blocked(block, rows, w, group_sizes)


def cotangent(w: BlockQuantizedExperts, d_master: jax.Array) -> BlockQuantizedExperts:
    """What the gradient of the master weights is as one of all of `w`."""
    assert w.master is not None
    zeros = zeros_alike(w.values), zeros_alike(w.scales)
    return BlockQuantizedExperts(*zeros, d_master.astype(w.master.dtype))


def _check(x: Any, w: Any, group_sizes: Any) -> None:
    if not isinstance(w, BlockQuantizedExperts):
        raise ValueError(
            f"grouped_matmul: x is FP8 (`QuantizedRows`), but w is {w.dtype}{list(w.shape)}. "
            "Quantise it with `jaxmoe.quantize_blocks`, or pass `x.dequantize(w.dtype)`."
        )
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"grouped_matmul: x must be [C, D] and w [L, D, F], got {list(x.shape)} and "
            f"{list(w.shape)}."
        )
    if group_sizes.shape != w.shape[:1] or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"grouped_matmul: group_sizes must be int32 {list(w.shape[:1])}, one for each matrix "
            f"of w, got {group_sizes.dtype} {list(group_sizes.shape)}."
        )
    if not isinstance(x, wire.QuantizedRows) and x.dtype not in (BF16, jnp.float16, F32):
        raise ValueError(
            f"grouped_matmul: x must be `QuantizedRows` or floats of at least 16 bits, got "
            f"{x.dtype}. Make rows of FP8 by `dispatch` with rows_dtype."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: tuple[str, int], x: Any, w: BlockQuantizedExperts, group_sizes: Any) -> Any:
    rows = x if isinstance(x, wire.QuantizedRows) else quantize_rows(x)
    y = forward(how, rows, w, group_sizes)
    return y if rows is x else y.astype(x.dtype)


def _product_fwd(how: tuple[str, int], x: Any, w: BlockQuantizedExperts, group_sizes: Any) -> Any:
    if isinstance(x, wire.QuantizedRows) and w.master is None:
        raise TypeError(
            "grouped_matmul: asked for a derivative, but x and w are both FP8 and have none. "
            "Quantise the weights with `quantize_blocks(w, keep_master=True)` for their gradient, "
            "pass float rows for the rows', or stop the gradient before this product."
        )
    return _product(how, x, w, group_sizes), (x, w, group_sizes)


def _product_bwd(how: tuple[str, int], residuals: Any, d_y: Any) -> Any:
    """As though nothing had been rounded, in the dtype of d_y (bfloat16 on the GPU):
    d_x_g = d_y_g w_g^T with the master weights, or else the dequantised ones; d_w_g = x_g^T d_y_g
    with the float rows, or else the dequantised ones.

    FP8 operands have no gradient: None stands for zeros of `QuantizedRows`, and of the weights'
    values and scales.
    """
    backend, block = how
    x, w, group_sizes = residuals
    module: Any = cuda if backend == "cuda" else blocked.Blocked(block)
    d_x = d_w = None
    if not isinstance(x, wire.QuantizedRows):
        weights = w.dequantize(d_y.dtype) if w.master is None else w.master.astype(d_y.dtype)
        d_x = module.input_grad(d_y, weights, group_sizes).astype(x.dtype)
    if w.master is not None:
        rows = x.dequantize(d_y.dtype) if isinstance(x, wire.QuantizedRows) else x
        d_master = module.weight_grad(rows.astype(d_y.dtype), d_y, group_sizes)
        d_w = cotangent(w, d_master)
    return d_x, d_w, None


_product.defvjp(_product_fwd, _product_bwd)


def _blocked(block: int, x: wire.QuantizedRows, w: BlockQuantizedExperts, group_sizes: Any) -> Any:
    """The definition, over blocks of rows."""
    capacity, features = x.shape[0], w.shape[2]
    blocks = Blocks(group_sizes, capacity, block)
    values, scales = _bits(x.values), x.scales
    of_w = _bits(w.values)

    def step(y: Any, group: Any, start: Any, used: Any) -> Any:
        rows, row_scales = blocks.read(values, start), blocks.read(scales, start)
        new = _one_group(rows, row_scales, of_w[group], w.scales[group])
        return blocks.write(y, new.astype(BF16), start, used)

    return blocks.fold(step, zeros_alike(x.scales, BF16, (capacity, features)))


def _one_group(x: Any, x_scales: Any, w: Any, w_scales: Any) -> Any:
    """[B, D] rows and [F, D] weights, as their bits, and their scales."""
    x, w = (_split(lax.bitcast_convert_type(a, jnp.float8_e4m3fn).astype(F32)) for a in (x, w))
    w_scales = jnp.repeat(w_scales, BLOCK, axis=0)[: w.shape[1]]

    def add(total: Any, part: Any) -> Any:
        x, x_scale, w, w_scale = part
        sums = jnp.matmul(x, w.T, precision=lax.Precision.HIGHEST)
        return total + sums * (x_scale[:, None] * w_scale[None, :]), None

    first = zeros_alike(x, F32, (x.shape[1], w.shape[1]))
    return lax.scan(add, first, (x, x_scales.T, w, w_scales.T))[0]


def _split(a: jax.Array) -> jax.Array:
    """[N, D] as [ceil(D / 128), N, 128], filled up with zeros."""
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % BLOCK)])
    return a.reshape(a.shape[0], -1, BLOCK).swapaxes(0, 1)


def _bits(a: jax.Array) -> jax.Array:
    """To be sliced: XLA's CPU backend would widen all FP8 values for that."""
    return lax.bitcast_convert_type(a, jnp.int8)
