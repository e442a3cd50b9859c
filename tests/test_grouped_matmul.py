"""`jaxmoe.grouped_matmul` on the host: values and gradients against dense products in float64."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import products
from jaxmoe.experts import swiglu_experts

# rows, D, F and the sizes of the groups, which leave rows over in some cases.
CASES = {
    "even": (32, 8, 16, (8, 8, 8, 8)),
    "uneven": (40, 24, 8, (0, 1, 20, 0, 7)),
    "huge": (70, 8, 8, (2, 66, 0)),
    "empty": (16, 8, 8, (0, 0)),
    "one_row": (1, 8, 8, (1,)),
    "odd_widths": (23, 5, 3, (9, 0, 11)),
}
BACKENDS = ("blocked", "ragged_dot")
# float32 sums of at most 70 products of values about 1, and bfloat16's rounding of the result.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-7}


def draw(case: str, dtype: str) -> tuple[Any, Any, Any, Any]:
    """x, w, group_sizes and d_y; rows past the last group are NaN."""
    capacity, dim, features, sizes = CASES[case]
    rng = np.random.default_rng(len(case))
    x = rng.standard_normal((capacity, dim), np.float32)
    w = rng.standard_normal((len(sizes), dim, features), np.float32)
    d_y = rng.standard_normal((capacity, features), np.float32)
    x[sum(sizes) :] = d_y[sum(sizes) :] = np.nan
    x, w, d_y = (jnp.asarray(a).astype(dtype) for a in (x, w, d_y))
    return x, w, jnp.asarray(sizes, jnp.int32), d_y


def dense(x: Any, w: Any, sizes: Any, d_y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, d_x and d_w in float64."""
    x, w, d_y = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, d_y))
    y, d_x, d_w = np.zeros_like(d_y), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        y[rows], d_x[rows] = x[rows] @ w[group], d_y[rows] @ w[group].T
        d_w[group] = x[rows].T @ d_y[rows]
        start += size
    return y, d_x, d_w


def assert_near(got: Any, want: np.ndarray, tolerance: float, name: str) -> None:
    scale = max(1.0, np.abs(want).max(initial=0.0))
    got = np.asarray(got.astype(jnp.float32))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_right(operands: Any, expected: Any, **options: Any) -> list[Any]:
    """y, d_x and d_w of x, w, group_sizes and d_y, which are near `expected`, in the dtype of x."""
    x, w, sizes, d_y = operands

    def product(x, w):
        return jaxmoe.grouped_matmul(x, w, sizes, **options)

    y, vjp = jax.vjp(jax.jit(product), x, w)
    got = [y, *vjp(d_y)]
    for name, g, want in zip(("y", "d_x", "d_w"), got, expected, strict=True):
        assert g.dtype == x.dtype, name
        assert_near(g, want, TOLERANCES[x.dtype.name], name)
    return got


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, backend: str, dtype: str):
    operands = draw(case, dtype)
    got = assert_right(operands, dense(*operands), backend=backend, block_rows=16)
    used = sum(CASES[case][3])
    for rows in got[:2]:
        np.testing.assert_array_equal(np.asarray(rows.astype(jnp.float32))[used:], 0)


def test_weight_gradients_add_up_in_float32():
    """256 + many ones: a bfloat16 sum would stay at 256."""
    rows = 512
    x = jnp.ones((rows, 8), jnp.bfloat16)
    w = jnp.zeros((1, 8, 8), jnp.bfloat16)
    sizes = jnp.asarray([rows], jnp.int32)
    for backend in BACKENDS:
        _, vjp = jax.vjp(
            lambda w, b=backend: jaxmoe.grouped_matmul(x, w, sizes, backend=b, block_rows=1), w
        )
        np.testing.assert_array_equal(
            np.asarray(vjp(jnp.ones((rows, 8), jnp.bfloat16))[0].astype(jnp.float32)), rows
        )


def test_in_scan_and_checkpoint():
    x, w, sizes, _ = draw("even", "float32")
    w = w[:, :, :8]

    def layers(x, w):
        layer = jax.checkpoint(lambda x, _: (jnp.tanh(jaxmoe.grouped_matmul(x, w, sizes)), None))
        return jnp.sum(jax.lax.scan(layer, x, None, length=3)[0])

    def unrolled(x, w):
        for _ in range(3):
            x = jnp.tanh(jnp.einsum("gcd,gdf->gcf", x.reshape(4, 8, 8), w).reshape(32, 8))
        return jnp.sum(x)

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, w) for f in (layers, unrolled))
    for g, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, groups, dim, features", [(0, 2, 8, 8), (4, 2, 0, 8), (4, 2, 8, 0)])
def test_empty_arrays(rows: int, groups: int, dim: int, features: int):
    sizes = jnp.zeros(groups, jnp.int32)
    y = jaxmoe.grouped_matmul(jnp.ones((rows, dim)), jnp.ones((groups, dim, features)), sizes)
    assert y.shape == (rows, features) and not np.asarray(y).any()


def test_sharded_rows_with_equal_weights():
    """The gradient of weights that all devices share is the sum over the devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x, w, sizes, _ = draw("even", "float32")

    def loss(x, w):
        product = jax.shard_map(
            lambda x, w, s: jaxmoe.grouped_matmul(x, w, s),
            mesh=mesh,
            in_specs=(spec("data"), spec(), spec()),
            out_specs=spec("data"),
        )
        return jnp.sum(product(x, w, sizes // 2) ** 2)

    def on_one(x, w):
        halves = (jaxmoe.grouped_matmul(h, w, sizes // 2) for h in jnp.split(x, 2))
        return jnp.sum(jnp.concatenate(list(halves)) ** 2)

    for got, want in zip(
        jax.jit(jax.grad(loss, (0, 1)))(x, w), jax.grad(on_one, (0, 1))(x, w), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)


ONES, WEIGHTS, SIZES = jnp.ones((4, 8)), jnp.ones((2, 8, 8)), jnp.zeros(2, jnp.int32)
ERRORS = {
    "x must be [C, D] or [L, S, D] and w [L, D, F], got [4, 8] and [2, 4, 8].": (
        ONES,
        WEIGHTS[:, :4],
        SIZES,
    ),
    "group_sizes must be int32 [2], one for each matrix of w, got int32 [1].": (
        ONES,
        WEIGHTS,
        SIZES[:1],
    ),
    "got float32 [2].": (ONES, WEIGHTS, SIZES.astype(jnp.float32)),
    "x and w must have one floating dtype, got bfloat16 and float32. Cast one of them.": (
        ONES.astype(jnp.bfloat16),
        WEIGHTS,
        SIZES,
    ),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_bad_arguments(sentence: str):
    with pytest.raises(ValueError, match=rf"^grouped_matmul: .*{re.escape(sentence)}"):
        jaxmoe.grouped_matmul(*ERRORS[sentence])


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fast'"):
        jaxmoe.grouped_matmul(ONES, WEIGHTS, SIZES, backend="fast")


def test_kernels_on_the_host():
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: its kernels need a Hopper GPU"):
        jaxmoe.grouped_matmul(ONES, WEIGHTS, SIZES, backend="cuda")


class FakeDevice:
    platform = "gpu"

    def __init__(self, capability: str):
        self.compute_capability = capability


@pytest.mark.parametrize(
    "capability, dtype, widths, reason",
    [
        ("8.0", "bfloat16", (8, 8), "compute capability 9.0 (Hopper); the device's is 8.0"),
        ("9.0", "float32", (8, 8), "need bfloat16, got float32"),
        ("9.0", "bfloat16", (8, 12), "widths that are multiples of 8, got 12"),
    ],
)
def test_auto_says_why(
    capability: str,
    dtype: str,
    widths: tuple[int, ...],
    reason: str,
):
    device: Any = FakeDevice(capability)
    choice = products.choose_backend("auto", jnp.dtype(dtype), widths, device)
    assert choice.backend == "blocked"
    assert reason in choice.reason


def test_auto_on_the_host():
    assert products.choose_backend("auto", jnp.float32, (8, 8)).backend == "blocked"


def test_shared_up_projection_is_refused_by_the_kernels():
    rows, matrix = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((2, 8, 8), jnp.bfloat16)
    sizes = jnp.array([2, 2], jnp.int32)
    with pytest.raises(ValueError, match="takes neither quantised weights nor a shared up"):
        swiglu_experts(rows, sizes, matrix, matrix[:1], matrix, backend="cuda")
