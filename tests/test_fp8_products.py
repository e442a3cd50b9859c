"""`jaxmoe.grouped_matmul` of FP8 operands on the host, against the same numbers in float64."""

from __future__ import annotations

import re
from typing import Any

import fp8_products
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.products.fp8 import choose_backend, quantize_rows

# rows, D, F and the sizes of the groups, which leave rows over in some cases.
CASES = {
    "even": (32, 256, 128, (8, 8, 8, 8)),
    "uneven": (40, 144, 136, (0, 1, 20, 0, 7)),
    "huge": (70, 16, 8, (2, 66, 0)),
    "empty": (16, 128, 8, (0, 0)),
    "one_row": (1, 16, 8, (1,)),
    "odd_widths": (23, 131, 129, (9, 0, 11)),
}


def wide(a: Any) -> np.ndarray:
    return np.asarray(a.astype(jnp.float32), np.float64)


def groups_of(sizes: Any) -> list[slice]:
    ends = np.cumsum(np.asarray(sizes))
    return [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]


# All cases in blocks of 8 rows; one in others too.
@pytest.mark.parametrize(
    ("case", "block_rows"), [*((case, 8) for case in CASES), ("uneven", 1), ("uneven", 128)]
)
def test_values(case: str, block_rows: int):
    """Float32 sums of exact products, 2^-24 of each term and no more than 2 dim / 128 + 128 times,
    then rounded to bfloat16.
    """
    _, _, x, w, sizes = fp8_products.draw(*CASES[case])
    y = jax.jit(lambda *a: jaxmoe.grouped_matmul(*a, block_rows=block_rows))(x, w, sizes)
    want, terms = fp8_products.exact(x, w, sizes)
    assert y.dtype == jnp.bfloat16
    assert (np.abs(wide(y) - want) <= 2**-8 * np.abs(want) + 2**-16 * terms).all()
    assert not wide(y)[sum(CASES[case][3]) :].any()


def test_sums_outlast_the_range_of_bfloat16():
    """A large block first, then small ones that only float32 sums keep."""
    dim = 128 * 40
    x = jnp.full((8, dim), 2.0**-9, jnp.bfloat16).at[:, :128].set(1)
    w = jnp.ones((1, dim, 8), jnp.bfloat16)
    rows, blocks = jax.jit(quantize_rows)(x), jaxmoe.quantize_blocks(w)
    y = jax.jit(jaxmoe.grouped_matmul)(rows, blocks, jnp.array([8], jnp.int32))
    np.testing.assert_allclose(wide(y), 128 + 39 * 128 * 2.0**-9, rtol=2**-8)


@pytest.mark.parametrize("shape", [(2, 256, 128), (3, 130, 200), (1, 16, 8), (0, 8, 8)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantized_blocks(shape: tuple[int, ...], dtype: str):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((shape[0], shape[1], 1)))
    w = jnp.asarray(w, jnp.float32).astype(dtype)
    if w.size:
        w = w.at[0, :16].set(0)
    q = jaxmoe.quantize_blocks(w)
    assert q.shape == shape and q.values.shape == (shape[0], shape[2], shape[1])
    assert q.scales.shape == (shape[0], -(-shape[2] // 128), -(-shape[1] // 128))
    scales = fp8_products.spread(fp8_products.spread(q.scales, 1, shape[2]), 2, shape[1])
    back, want = wide(q.dequantize()), wide(w)
    bound = np.maximum((2**-4 + 2**-10) * np.abs(want), (2**-10 + 2**-19) * scales.swapaxes(1, 2))
    assert (np.abs(back - want) <= bound).all()


def test_gradients_of_float_rows_and_master_weights():
    """As those of the product in floats, whether the weights were dequantised for it or kept."""
    x, w, _, _, sizes = fp8_products.draw(*CASES["uneven"])
    d_y = jnp.asarray(np.random.default_rng(1).standard_normal((40, 136)), jnp.bfloat16)

    def plain(x: Any, w: Any) -> Any:
        return jaxmoe.grouped_matmul(x, w, sizes, backend="blocked")

    def with_master(x: Any, w: Any) -> Any:
        return jaxmoe.grouped_matmul(x, jaxmoe.quantize_blocks(w, keep_master=True), sizes)

    x = jnp.nan_to_num(x)
    want = jax.jit(lambda x, w: jax.vjp(plain, x, w)[1](d_y))(x, w)
    got = jax.jit(lambda x, w: jax.vjp(with_master, x, w)[1](d_y))(x, w)
    for g, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(wide(g), wide(expected))
    frozen = jaxmoe.quantize_blocks(w)
    d_x = jax.vjp(lambda x: jaxmoe.grouped_matmul(x, frozen, sizes), x)[1](d_y)[0]
    want = jax.vjp(lambda x: plain(x, frozen.dequantize(jnp.bfloat16)), x)[1](d_y)[0]
    np.testing.assert_array_equal(wide(d_x), wide(want))


def test_gradient_of_master_weights_with_fp8_rows():
    _, w, rows, _, sizes = fp8_products.draw(*CASES["uneven"])
    d_y = jnp.asarray(np.random.default_rng(1).standard_normal((40, 136)), jnp.bfloat16)

    def product(w: Any) -> Any:
        return jaxmoe.grouped_matmul(rows, jaxmoe.quantize_blocks(w, keep_master=True), sizes)

    d_w = jax.vjp(product, w)[1](d_y)[0]
    assert d_w.dtype == w.dtype
    x = np.nan_to_num(wide(rows.dequantize(jnp.bfloat16)))
    for group, at in enumerate(groups_of(sizes)):
        want = x[at].T @ wide(d_y)[at]
        scale = max(1.0, np.abs(want).max(initial=0))
        np.testing.assert_allclose(wide(d_w)[group], want, rtol=0, atol=2**-7 * scale)


def test_float_rows_are_quantised_as_dispatch_does():
    x, _, rows, w, sizes = fp8_products.draw(*CASES["uneven"])
    y = jaxmoe.grouped_matmul(x.astype(jnp.float32), w, sizes)
    assert y.dtype == jnp.float32
    same = jaxmoe.grouped_matmul(quantize_rows(x.astype(jnp.float32)), w, sizes)
    np.testing.assert_array_equal(wide(y), wide(same))
    np.testing.assert_array_equal(wide(jaxmoe.grouped_matmul(rows, w, sizes)), wide(same))


def test_bad_operands_are_refused():
    _, w, rows, blocks, sizes = fp8_products.draw(*CASES["even"])
    call = jaxmoe.grouped_matmul
    with pytest.raises(ValueError, match=re.escape("Quantise it with `jaxmoe.quantize_blocks`")):
        call(rows, w, sizes)
    with pytest.raises(ValueError, match=re.escape("got [32, 256] and [4, 128, 256]")):
        call(rows, jaxmoe.quantize_blocks(w.swapaxes(1, 2)), sizes)
    with pytest.raises(ValueError, match=re.escape("group_sizes must be int32 [4]")):
        call(rows, blocks, sizes[:3])
    with pytest.raises(ValueError, match="backend for FP8 operands must be one of"):
        call(rows, blocks, sizes, backend="ragged_dot")
    with pytest.raises(RuntimeError, match="need a Hopper GPU; the device is a cpu"):
        call(rows, blocks, sizes, backend="cuda")
    with pytest.raises(ValueError, match=re.escape("wanted floats [L, I, O]")):
        jaxmoe.quantize_blocks(w[0])
    with pytest.raises(TypeError, match="x and w are both FP8"):
        jax.grad(lambda s: jnp.sum(call(rows, _scaled(blocks, s), sizes).astype(jnp.float32)))(1.0)


def _scaled(w: Any, factor: Any) -> Any:
    return jaxmoe.BlockQuantizedExperts(w.values, w.scales * factor)


def test_choice_of_the_backend():
    class Hopper:
        platform, compute_capability = "gpu", "9.0"

    class Ampere:
        platform, compute_capability = "gpu", "8.0"

    assert choose_backend("auto", jnp.bfloat16, (24, 16), Hopper()) == "blocked"
    assert choose_backend("auto", jnp.bfloat16, (32, 16), Ampere()) == "blocked"
    with pytest.raises(RuntimeError, match=re.escape("capability 9.0")):
        choose_backend("cuda", jnp.bfloat16, (32, 16), Ampere())


def test_under_shard_map_with_rows_of_dispatch():
    """Rows that `dispatch` hands over in FP8 go straight in."""
    dim = 256
    group = jaxmoe.ExpertParallel(
        None,
        num_experts=4,
        top_k=2,
        dim=dim,
        max_tokens=16,
        dtype=jnp.bfloat16,
        wire_dtype=jnp.float8_e4m3fn,
        rows_dtype=jnp.float8_e4m3fn,
        transport="xla",
    )
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((16, dim)), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, 4, (16, 2)), jnp.int32)
    w = jaxmoe.quantize_blocks(jnp.asarray(rng.standard_normal((4, dim, 128)), jnp.bfloat16))

    @jax.jit
    def run(x: Any, ids: Any) -> Any:
        rows, _, plan = jaxmoe.dispatch(group, x, ids, jnp.ones((16, 2), jnp.float32))
        return jaxmoe.grouped_matmul(rows, w, plan.group_sizes), rows, plan.group_sizes

    y, rows, sizes = run(x, ids)
    want, terms = fp8_products.exact(rows, w, sizes)
    assert int(sizes.sum()) == 32
    assert (np.abs(wide(y) - want) <= 2**-8 * np.abs(want) + 2**-16 * terms).all()
