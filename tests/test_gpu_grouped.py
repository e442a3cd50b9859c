"""`jaxmoe.grouped_matmul` and `swiglu_experts` by the kernels for Hopper GPUs, on one GPU.

Without a GPU the tests are skipped; with `JAXMOE_REQUIRE_GPUS` in the environment that is a
failure. Expected values are sums in float64 of the same bfloat16 operands.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import fp8_products
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fp8_experts import plain_gradients

import jaxmoe
from jaxmoe import experts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

# rows, D, F and the sizes of the groups.
CASES = {
    "even": (512, 256, 512, (256, 256)),
    "uneven": (300, 72, 136, (0, 1, 200, 0, 17)),
    "huge": (1100, 128, 200, (3, 1061, 0)),
    "empty": (40, 64, 64, (0, 0)),
    "one_row": (1, 8, 8, (1,)),
    "seventy_groups": (
        999,
        264,
        72,
        tuple(np.random.default_rng(0).multinomial(950, [1 / 70] * 70)),
    ),
    "every_width": (2176, 64, 128, tuple(range(1, 272, 17))),
}
# One rounding to bfloat16 (2**-8) of float32 sums, relative to the size of their terms: sums of
# terms with both signs may be smaller than what was rounded on the way to them.
TOLERANCE = 2**-8


@pytest.fixture(autouse=True)
def gpus():
    """Skip, or fail where GPUs are required."""
    found = [d for d in jax.devices() if d.platform == "gpu"]
    if not found and os.environ.get("JAXMOE_REQUIRE_GPUS"):
        pytest.fail("JAXMOE_REQUIRE_GPUS is set, but JAX sees no GPU")
    if not found or found[0].compute_capability != "9.0":
        pytest.skip("needs a Hopper GPU")


def draw(case: str) -> tuple[Any, ...]:
    """x, w, sizes and d_y; rows past the last group are NaN."""
    capacity, dim, features, sizes = CASES[case]
    rng = np.random.default_rng(len(case))
    x = rng.standard_normal((capacity, dim), np.float32)
    w = rng.standard_normal((len(sizes), dim, features), np.float32) / np.float32(dim**0.5)
    d_y = rng.standard_normal((capacity, features), np.float32)
    x[sum(sizes) :] = d_y[sum(sizes) :] = np.nan
    x, w, d_y = (jnp.asarray(a).astype(jnp.bfloat16) for a in (x, w, d_y))
    return x, w, jnp.asarray(sizes, jnp.int32), d_y


def wide(a: Any) -> np.ndarray:
    return np.asarray(a.astype(jnp.float32), np.float64)


def groups_of(sizes: Any) -> list[slice]:
    ends = np.cumsum(np.asarray(sizes))
    return [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]


def assert_near(got: Any, want: np.ndarray, name: str) -> None:
    scale = max(1.0, float(np.sqrt(np.mean(want**2))))
    np.testing.assert_allclose(
        wide(got), want, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=name
    )


def dense(x: Any, w: Any, sizes: Any, d_y: Any) -> tuple[np.ndarray, ...]:
    """y, d_x and d_w."""
    x, w, d_y = wide(x), wide(w), wide(d_y)
    y, d_x, d_w = np.zeros_like(d_y), np.zeros_like(x), np.zeros_like(w)
    for group, rows in enumerate(groups_of(sizes)):
        y[rows], d_x[rows] = x[rows] @ w[group], d_y[rows] @ w[group].T
        d_w[group] = x[rows].T @ d_y[rows]
    return y, d_x, d_w


def dense_swiglu(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, d_y: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The result and all gradients. In NumPy, for JAX would compile every size."""
    a, b = x @ gate, x @ up
    sigmoid = 1 / (1 + np.exp(-a))
    hidden, d_hidden = a * sigmoid * b, d_y @ down.T
    d_a, d_b = d_hidden * b * sigmoid * (1 + a * (1 - sigmoid)), d_hidden * a * sigmoid
    d_x = d_a @ gate.T + d_b @ up.T
    return hidden @ down, d_x, x.T @ d_a, x.T @ d_b, hidden.T @ d_y


def values_and_gradients(x: Any, w: Any, sizes: Any, d_y: Any, backend: str = "cuda") -> Any:
    product = functools.partial(jaxmoe.grouped_matmul, group_sizes=sizes, backend=backend)
    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(d_y)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str):
    operands = draw(case)
    got = jax.jit(values_and_gradients)(*operands)
    for name, g, want in zip(("y", "d_x", "d_w"), got, dense(*operands), strict=True):
        assert_near(g, want, name)
    used = int(sum(CASES[case][3]))
    assert not wide(got[0])[used:].any() and not wide(got[1])[used:].any()


@pytest.mark.parametrize("case", CASES)
def test_fused_experts(case: str):
    """Against the unfused computation in float64."""
    rows, gate, sizes, _ = draw(case)
    rng = np.random.default_rng(9)
    num_groups, dim, features = gate.shape
    up = jnp.asarray(rng.standard_normal(gate.shape, np.float32) / np.float32(dim**0.5))
    down = jnp.asarray(
        rng.standard_normal((num_groups, features, dim), np.float32) / np.float32(features**0.5)
    )
    up, down = up.astype(jnp.bfloat16), down.astype(jnp.bfloat16)
    d_y = jnp.asarray(rng.standard_normal(rows.shape, np.float32)).astype(jnp.bfloat16)

    @jax.jit
    def run(rows, gate, up, down):
        def f(*args):
            return experts.swiglu_experts(args[0], sizes, *args[1:], backend="cuda")

        y, vjp = jax.vjp(f, rows, gate, up, down)
        return f(rows, gate, up, down), y, vjp(d_y)

    plain, y, grads = run(rows, gate, up, down)
    np.testing.assert_array_equal(wide(plain), wide(y))
    want = [np.zeros(a.shape) for a in (rows, rows, gate, up, down)]
    for group, at in enumerate(groups_of(sizes)):
        one = [wide(a) for a in (rows[at], gate[group], up[group], down[group], d_y[at])]
        want[0][at], want[1][at], *d_weights = dense_swiglu(*one)
        for total, d in zip(want[2:], d_weights, strict=True):
            total[group] = d
    # The hidden values and their gradients are rounded on the way, each to 2**-8.
    for name, got, w in zip(("y", "rows", "gate", "up", "down"), (y, *grads), want, strict=True):
        scale = max(1.0, float(np.sqrt(np.mean(w**2))))
        np.testing.assert_allclose(wide(got), w, rtol=2**-5, atol=2**-4 * scale, err_msg=name)


def test_repeated_calls_give_the_same_bits():
    """The order in which blocks run changes from call to call; the result does not."""
    operands = draw("seventy_groups")
    run = jax.jit(values_and_gradients)
    first = [wide(a) for a in run(*operands)]
    for _ in range(50):
        for got, want in zip(run(*operands), first, strict=True):
            np.testing.assert_array_equal(wide(got), want)


def test_sizes_change_without_compiling_again():
    x, w, _, d_y = draw("even")
    x, d_y = (jnp.nan_to_num(a) for a in (x, d_y))
    run = jax.jit(lambda *operands: values_and_gradients(*operands))  # with a cache of its own
    for sizes in ((512, 0), (0, 512), (1, 2), (255, 257), (0, 0)):
        group_sizes = jnp.asarray(sizes, jnp.int32)
        got = run(x, w, group_sizes, d_y)
        for name, g, want in zip(
            ("y", "d_x", "d_w"), got, dense(x, w, group_sizes, d_y), strict=True
        ):
            assert_near(g, want, f"{name} {sizes}")
    assert run._cache_size() == 1


def test_scan_of_layers():
    """In a loop and under checkpoint, against a loop over blocks of rows."""
    x, w, sizes, _ = draw("uneven")
    w = jnp.concatenate([w, w], axis=2)[:, :, :72]

    def loss(x, w, backend):
        def layer(x, _):
            y = jaxmoe.grouped_matmul(x, w, sizes, backend=backend, block_rows=16)
            return jnp.tanh(y), None

        return jnp.sum(
            jax.lax.scan(jax.checkpoint(layer), x, None, length=8)[0].astype(jnp.float32)
        )

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    x = jnp.nan_to_num(x)
    for got, want in zip(grad(x, w, "cuda"), grad(x, w, "blocked"), strict=True):
        scale = float(np.sqrt(np.mean(wide(want) ** 2)))
        np.testing.assert_allclose(wide(got), wide(want), rtol=0.05, atol=0.1 * scale)


def test_auto_picks_the_kernels():
    x, w, sizes, _ = draw("even")
    text = jax.jit(jaxmoe.grouped_matmul).lower(x, w, sizes).as_text()
    assert "jaxmoe_grouped_matmul" in text


# rows, D, F and the sizes of the groups, for FP8 operands.
FP8_CASES = {
    "even": (512, 256, 512, (256, 256)),
    "uneven": (301, 144, 136, (0, 1, 200, 0, 17)),
    "huge": (1100, 1040, 200, (3, 1061, 0)),
    "empty": (40, 64, 64, (0, 0)),
    "one_row": (1, 16, 8, (1,)),
    "every_width": (2211, 128, 128, tuple(range(1, 273, 17))),
}
# What the tensor cores lose within a sum of 128 products, relative to the magnitudes of its terms:
# they keep at least 13 bits of the largest. All else is float32, but for the result's rounding.
FP8_SUM_TOLERANCE = 2**-12


@pytest.mark.parametrize("case", FP8_CASES)
def test_fp8_values(case: str):
    """Against the exact products of the quantised numbers."""
    _, _, x, w, sizes = fp8_products.draw(*FP8_CASES[case])
    product = jax.jit(functools.partial(jaxmoe.grouped_matmul, backend="cuda"))
    y = wide(product(x, w, sizes))
    want, terms = fp8_products.exact(x, w, sizes)
    assert (np.abs(y - want) <= TOLERANCE * np.abs(want) + FP8_SUM_TOLERANCE * terms).all()
    assert not y[sum(FP8_CASES[case][3]) :].any()
    for _ in range(20):
        np.testing.assert_array_equal(wide(product(x, w, sizes)), y)


def test_fp8_gradients_are_those_of_the_product_in_floats():
    x, w, _, _, sizes = fp8_products.draw(*FP8_CASES["uneven"])
    d_y = jnp.asarray(np.random.default_rng(1).standard_normal((301, 136)), jnp.bfloat16)

    @jax.jit
    def run(x: Any, w: Any, d_y: Any) -> Any:
        def fp8(x: Any, w: Any) -> Any:
            blocks = jaxmoe.quantize_blocks(w, keep_master=True)
            return jaxmoe.grouped_matmul(x, blocks, sizes, backend="cuda")

        def plain(x: Any, w: Any) -> Any:
            return jaxmoe.grouped_matmul(x, w, sizes, backend="cuda")

        return jax.vjp(fp8, x, w)[1](d_y), jax.vjp(plain, x, w)[1](d_y)

    for got, want in zip(*run(x, w, d_y), strict=True):
        np.testing.assert_array_equal(wide(got), wide(want))


def test_auto_picks_the_fp8_kernel():
    _, _, x, w, sizes = fp8_products.draw(*FP8_CASES["even"])
    assert "jaxmoe_grouped_fp8" in jax.jit(jaxmoe.grouped_matmul).lower(x, w, sizes).as_text()


# rows, D, F and the sizes of the groups: both widths are rows of FP8 operands here.
FP8_SWIGLU_CASES = {
    "even": (512, 256, 512, (256, 256)),
    "uneven": (301, 144, 176, (0, 1, 200, 0, 17)),
    "every_width": (2211, 128, 144, tuple(range(1, 273, 17))),
}


def draw_experts(case: str) -> tuple[Any, list[Any], Any, Any]:
    """Rows, NaN past the last group; gate, up and down; sizes and d_y."""
    capacity, dim, features, sizes = FP8_SWIGLU_CASES[case]
    rng = np.random.default_rng(len(case))
    x, d_y = rng.standard_normal((2, capacity, dim))
    x[sum(sizes) :] = np.nan
    shapes = [(len(sizes), dim, features)] * 2 + [(len(sizes), features, dim)]
    weights = [rng.standard_normal(s) / s[1] ** 0.5 for s in shapes]
    x, d_y, *weights = (jnp.asarray(a, jnp.bfloat16) for a in (x, d_y, *weights))
    return x, weights, jnp.asarray(sizes, jnp.int32), d_y


@pytest.mark.parametrize("form", ["floats", "fp8"])
@pytest.mark.parametrize("case", FP8_SWIGLU_CASES)
def test_fp8_swiglu(case: str, form: str):
    """Three of the products above: as a whole, since a hidden number that two programs round apart
    becomes another code.
    """
    x, weights, sizes, _ = draw_experts(case)
    blocks = [jaxmoe.quantize_blocks(w) for w in weights]
    product = functools.partial(jaxmoe.grouped_matmul, backend="cuda")

    @jax.jit
    def by_products(rows: Any, gate: Any, up: Any, down: Any) -> Any:
        a, b = (product(rows, w, sizes).astype(jnp.float32) for w in (gate, up))
        return product((jax.nn.silu(a) * b).astype(jnp.bfloat16), down, sizes)

    rows = jax.jit(fp8_products.quantize_rows)(x)
    swiglu = jax.jit(functools.partial(experts.swiglu_experts, backend="cuda"))
    got = wide(swiglu(rows if form == "fp8" else x, sizes, *blocks))
    want = wide(by_products(rows, *blocks))
    assert np.linalg.norm(got - want) <= 2**-7 * np.linalg.norm(want)
    assert want.any() and not got[sum(FP8_SWIGLU_CASES[case][3]) :].any()


@pytest.mark.parametrize("form", ["floats", "fp8"])
def test_fp8_swiglu_gradients(form: str):
    """In float64 at the products in FP8, from the master weights; up to four roundings to bfloat16,
    relative to the largest.
    """
    x, weights, sizes, d_y = draw_experts("uneven")
    x = jnp.nan_to_num(x)
    rows = jax.jit(fp8_products.quantize_rows)(x)

    @jax.jit
    def gradients(x: Any, weights: Any, d_y: Any) -> Any:
        def call(x: Any, weights: Any) -> Any:
            masters = [jaxmoe.quantize_blocks(w, keep_master=True) for w in weights]
            operand = rows if form == "fp8" else x
            return experts.swiglu_experts(operand, sizes, *masters, backend="cuda")

        return jax.vjp(call, x, weights)[1](d_y)

    d_x, d_weights = gradients(x, weights, d_y)
    blocks = [jaxmoe.quantize_blocks(w) for w in weights[:2]]
    products = [jaxmoe.grouped_matmul(rows, w, sizes, backend="cuda") for w in blocks]
    used = rows.dequantize(jnp.bfloat16) if form == "fp8" else x
    want_x, *want = plain_gradients(used, weights, sizes, products, d_y)
    got = [*d_weights, d_x] if form == "floats" else d_weights
    for g, expected in zip(got, [*want, want_x], strict=False):
        atol = 2**-6 * np.abs(expected).max()
        np.testing.assert_allclose(wide(g), expected, rtol=0, atol=atol)
