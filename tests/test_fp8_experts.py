"""`swiglu_experts` of weights in FP8 on the host: values, gradients, what is refused."""

from __future__ import annotations

import re
from typing import Any

import fp8_products
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.experts import swiglu_experts
from jaxmoe.products.fp8 import quantize_rows

# rows, D, F and the sizes of the groups, which leave rows over in some cases.
CASES = {
    "even": (32, 256, 128, (8, 8, 8, 8)),
    "uneven": (40, 144, 136, (0, 1, 20, 0, 7)),
    "empty": (16, 128, 8, (0, 0)),
    "one_row": (1, 16, 8, (1,)),
    "odd_widths": (23, 131, 129, (9, 0, 11)),
}


def wide(a: Any) -> np.ndarray:
    return np.asarray(a.astype(jnp.float32), np.float64)


def draw(case: str) -> tuple[Any, list[Any], Any]:
    """Rows in bfloat16, NaN past the last group; gate, up and down; group_sizes."""
    capacity, dim, features, sizes = CASES[case]
    rng = np.random.default_rng(len(case))
    x = rng.standard_normal((capacity, dim))
    x[sum(sizes) :] = np.nan
    shapes = [(len(sizes), dim, features)] * 2 + [(len(sizes), features, dim)]
    weights = [rng.standard_normal(s) / s[1] ** 0.5 for s in shapes]
    x, *weights = (jnp.asarray(a, jnp.float32).astype(jnp.bfloat16) for a in (x, *weights))
    return x, weights, jnp.asarray(sizes, jnp.int32)


def in_fp8(weights: Any, keep_master: bool = False) -> list[Any]:
    return [jaxmoe.quantize_blocks(w, keep_master=keep_master) for w in weights]


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def rounded_hidden(h: np.ndarray, size: int) -> np.ndarray:
    """How far Q(h) is from h at most: the bound of `jaxmoe.wire`, with its "amax" scales."""
    blocks = np.pad(np.abs(h), [(0, 0), (0, -size % 128)]).reshape(h.shape[0], -1, 128)
    scales = fp8_products.spread(blocks.max(-1) / 448, 1, size)
    return np.maximum(2**-4 * np.abs(h), 2**-10 * scales)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["floats", "fp8"])
def test_values(case: str, form: str):
    """Against float64 sums of the quantised operands, with hidden rows that are not quantised: then
    y is off by what Q moves h, and by the roundings of a, b, h and y to bfloat16.
    """
    x, weights, sizes = draw(case)
    rows = jax.jit(quantize_rows)(x)
    gate, up, down = in_fp8(weights)
    call = jax.jit(lambda *a: swiglu_experts(*a, block_rows=8))
    y = call(rows if form == "fp8" else x, sizes, gate, up, down)
    assert y.shape == x.shape and y.dtype == jnp.bfloat16

    (a, a_terms), (b, b_terms) = (fp8_products.exact(rows, w, sizes) for w in (gate, up))
    d_a, d_b = (2**-8 * np.abs(p) + 2**-16 * t for p, t in ((a, a_terms), (b, b_terms)))
    h = silu(a) * b
    # |silu'| is less than 1.1; and silu(a) is itself no more than |a|.
    d_h = 1.1 * d_a * np.abs(b) + np.abs(silu(a)) * d_b + 1.1 * d_a * d_b + 2**-8 * np.abs(h)
    d_h += (1 + 2**-3) * rounded_hidden(np.abs(h) + d_h, h.shape[1])
    weight = wide(down.dequantize())
    expert = np.repeat(np.arange(len(sizes)), np.asarray(sizes))
    used = len(expert)
    want = np.einsum("rf,rfd->rd", h[:used], weight[expert])
    off = np.einsum("rf,rfd->rd", d_h[:used], np.abs(weight[expert]))
    got = wide(y)
    assert (np.abs(got[:used] - want) <= 2**-8 * np.abs(want) + 1.01 * off).all()
    assert not got[used:].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_three_products_with_swiglu_in_float32(dtype: str):
    """Bit for bit."""
    x, weights, sizes = draw("uneven")
    x, (gate, up, down) = x.astype(dtype), in_fp8(weights)

    @jax.jit
    def both(x: Any, gate: Any, up: Any, down: Any) -> Any:
        rows = quantize_rows(x)
        a, b = (jaxmoe.grouped_matmul(rows, w, sizes).astype(jnp.float32) for w in (gate, up))
        hidden = quantize_rows((jax.nn.silu(a) * b).astype(jnp.bfloat16))
        want = jaxmoe.grouped_matmul(hidden, down, sizes)
        return swiglu_experts(x, sizes, gate, up, down), want

    got, want = both(x, gate, up, down)
    assert got.dtype == dtype and want.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide(got), wide(want))


def plain_gradients(x: Any, weights: Any, sizes: Any, products: Any, d_y: Any) -> list[np.ndarray]:
    """In float64, of the rows and the three weights, at the products a and b."""
    x, d_y, *weights = (wide(v) for v in (x, d_y, *weights))
    (a, b), (gate, up, down) = (wide(p) for p in products), weights
    sigmoid = 1 / (1 + np.exp(-a))
    d_x = np.zeros_like(x)
    d_weights = [np.zeros_like(w) for w in weights]
    end = 0
    for g, size in enumerate(np.asarray(sizes)):
        at, end = slice(end, end + size), end + size
        d_h = d_y[at] @ down[g].T
        d_b = d_h * (a * sigmoid)[at]
        d_a = d_h * b[at] * (sigmoid * (1 + a * (1 - sigmoid)))[at]
        d_x[at] = d_a @ gate[g].T + d_b @ up[g].T
        factors = ((x[at], d_a), (x[at], d_b), ((a * sigmoid * b)[at], d_y[at]))
        for d, (left, right) in zip(d_weights, factors, strict=True):
            d[g] = left.T @ right
    return [d_x, *d_weights]


@pytest.mark.parametrize("case", ["even", "uneven"])
@pytest.mark.parametrize("form", ["floats", "fp8"])
def test_gradients(case: str, form: str):
    """Those of the float computation with the master weights, at the products in FP8. Up to four
    roundings to bfloat16, relative to the largest: sums may be smaller than their terms.
    """
    x, weights, sizes = draw(case)
    x = jnp.nan_to_num(x)
    rows = jax.jit(quantize_rows)(x)
    d_y = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    d_y = jnp.asarray(d_y).astype(jnp.bfloat16)

    @jax.jit
    def gradients(x: Any, weights: Any) -> Any:
        def call(x: Any, weights: Any) -> Any:
            operand = x if form == "floats" else rows
            return swiglu_experts(operand, sizes, *in_fp8(weights, True), block_rows=8)

        return jax.vjp(call, x, weights)[1](d_y)

    d_x, d_weights = gradients(x, weights)
    products = [jaxmoe.grouped_matmul(rows, w, sizes) for w in in_fp8(weights[:2])]
    used = x if form == "floats" else rows.dequantize(jnp.bfloat16)
    want_x, *want = plain_gradients(used, weights, sizes, products, d_y)
    if form == "floats":
        want.append(want_x)
    else:
        assert not wide(d_x).any()
    for got, expected in zip((*d_weights, d_x), want, strict=False):
        assert got.dtype == jnp.bfloat16
        atol = 2**-6 * np.abs(expected).max()
        np.testing.assert_allclose(wide(got), expected, rtol=0, atol=atol)


def test_gradients_equal_those_in_floats_where_fp8_is_exact():
    """Operands and hidden values that FP8 holds: a = 256 x_0 and larger, so that silu(a) = a."""
    dim = features = 128
    x = np.zeros((8, dim), np.float32)
    x[:, 0] = 2.0 ** np.arange(8).clip(0, 3)
    weights = np.zeros((3, 1, dim, features), np.float32)
    weights[0, :, 0] = 64
    weights[1, :, 0] = 0.5
    weights[2] = np.eye(dim)
    x, sizes = jnp.asarray(x), jnp.array([8], jnp.int32)
    weights = list(jnp.asarray(weights))
    d_y = jnp.ones_like(x)

    def fp8(x: Any, weights: Any) -> Any:
        return swiglu_experts(x, sizes, *in_fp8(weights, True))

    def floats(x: Any, weights: Any) -> Any:
        return swiglu_experts(x, sizes, *weights)

    (y, vjp), (want_y, want_vjp) = (jax.vjp(f, x, weights) for f in (fp8, floats))
    np.testing.assert_array_equal(y, want_y)
    for got, want in zip(*map(jax.tree.leaves, (vjp(d_y), want_vjp(d_y))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_a_shared_up_projection():
    x, weights, sizes = draw("uneven")
    x = jnp.nan_to_num(x)
    gate, up, down = weights
    d_y = jnp.ones_like(x)

    def run(up: Any) -> Any:
        def call(x: Any, gate: Any, up: Any, down: Any) -> Any:
            return swiglu_experts(x, sizes, *in_fp8([gate, up, down], True))

        y, vjp = jax.vjp(jax.jit(call), x, gate, up, down)
        return y, *vjp(d_y)

    shared, each = run(up[2:3]), run(jnp.broadcast_to(up[2:3], up.shape))
    for index, (got, want) in enumerate(zip(shared, each, strict=True)):
        want = np.sum(wide(want), 0, keepdims=True) if index == 3 else wide(want)
        atol = 2**-7 * np.abs(want).max() if index == 3 else 0
        np.testing.assert_allclose(wide(got), want, rtol=0, atol=atol)


def test_bad_operands_are_refused():
    x, weights, sizes = draw("even")
    gate, up, down = in_fp8(weights)
    call = swiglu_experts
    with pytest.raises(ValueError, match=r"the other weights are in FP8.*, but up .*of bfloat16"):
        call(x, sizes, gate, weights[1], down)
    with pytest.raises(ValueError, match=r"the rows \(`QuantizedRows`\) are in FP8.*but gate"):
        call(quantize_rows(x), sizes, *weights)
    with pytest.raises(ValueError, match=re.escape("down has shape [4, 256, 128], wanted")):
        call(x, sizes, gate, up, gate)
    with pytest.raises(ValueError, match="floats of at least 16 bits, got float8_e4m3fn"):
        call(x.astype(jnp.float8_e4m3fn), sizes, gate, up, down)
    for backend in ("tokamax", "ragged_dot", "batched"):
        with pytest.raises(ValueError, match=f"backend for FP8 operands.*got '{backend}'"):
            call(x, sizes, gate, up, down, backend=backend, max_rows=8)
    with pytest.raises(RuntimeError, match="need a Hopper GPU; the device is a cpu"):
        call(x, sizes, gate, up, down, backend="cuda")
    masters = in_fp8(weights, True)
    with pytest.raises(TypeError, match="asked for a derivative, but up, down are in FP8"):
        jax.vjp(lambda x: call(x, sizes, masters[0], up, down), x)


def test_no_rows():
    _, weights, sizes = draw("even")
    y = swiglu_experts(jnp.zeros((0, 256), jnp.bfloat16), 0 * sizes, *in_fp8(weights))
    assert y.shape == (0, 256) and y.dtype == jnp.bfloat16
