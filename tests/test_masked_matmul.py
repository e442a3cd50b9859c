"""`jaxmoe.grouped_matmul` in the masked layout: fixed slots for each group, the first in use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grouped_matmul import TOLERANCES, assert_right

import jaxmoe
from jaxmoe import products
from jaxmoe.products import cuda, ragged

# slots, D, F and the rows in use of each group.
CASES = {
    "some": (6, 8, 16, (3, 0, 6, 1)),
    "none": (4, 8, 8, (0, 0)),
    "full": (5, 3, 7, (5, 5, 5)),
    "too_many": (4, 8, 8, (9, 2)),
}
BACKENDS = ("batched", "blocked", "cuda")


@pytest.fixture(autouse=True)
def kernels_stand_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "why_not", lambda *_: "")
    for name in ("forward", "input_grad", "weight_grad"):
        monkeypatch.setattr(cuda, name, getattr(ragged, name))


def draw(case: str, dtype: str) -> tuple[Any, Any, Any, Any]:
    """x, w, group_sizes and d_y; slots that are not in use hold NaN."""
    slots, dim, features, sizes = CASES[case]
    rng = np.random.default_rng(len(case))
    x = rng.standard_normal((len(sizes), slots, dim), np.float32)
    w = rng.standard_normal((len(sizes), dim, features), np.float32)
    d_y = rng.standard_normal((len(sizes), slots, features), np.float32)
    for group, size in enumerate(sizes):
        x[group, size:] = d_y[group, size:] = np.nan
    x, w, d_y = (jnp.asarray(a).astype(dtype) for a in (x, w, d_y))
    return x, w, jnp.asarray(sizes, jnp.int32), d_y


def dense(x: Any, w: Any, sizes: Any, d_y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, d_x and d_w in float64."""
    x, w, d_y = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, d_y))
    y, d_x, d_w = np.zeros_like(d_y), np.zeros_like(x), np.zeros_like(w)
    for g, size in enumerate(np.asarray(sizes)):
        y[g, :size], d_x[g, :size] = x[g, :size] @ w[g], d_y[g, :size] @ w[g].T
        d_w[g] = x[g, :size].T @ d_y[g, :size]
    return y, d_x, d_w


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, backend: str, dtype: str):
    operands = draw(case, dtype)
    got = assert_right(operands, dense(*operands), backend=backend, block_rows=4)
    unused = np.arange(CASES[case][0]) >= np.asarray(operands[2])[:, None]
    for rows in got[:2]:
        np.testing.assert_array_equal(np.asarray(rows.astype(jnp.float32))[unused], 0)


def test_is_the_product_of_rows_one_after_the_other():
    x, w, sizes, _ = draw("some", "float32")
    used = np.arange(6) < np.asarray(sizes)[:, None]
    rows = jnp.asarray(np.asarray(x)[used])
    want = jaxmoe.grouped_matmul(rows, w, sizes)
    got = np.asarray(jaxmoe.grouped_matmul(x, w, sizes))[used]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_sharded_groups():
    """Each device has groups of its own."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("expert")
    x, w, sizes, d_y = draw("some", "float32")
    for backend in BACKENDS:
        product = jax.shard_map(
            lambda *a, b=backend: jaxmoe.grouped_matmul(*a, backend=b),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
        y, vjp = jax.vjp(lambda x, w, p=product: jax.jit(p)(x, w, sizes), x, w)
        for g, want in zip((y, *vjp(d_y)), dense(x, w, sizes, d_y), strict=True):
            np.testing.assert_allclose(g, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty_arrays(shape: tuple[int, ...]):
    w, sizes = jnp.ones((shape[0], 8, 5)), jnp.zeros(shape[0], jnp.int32)
    y = jaxmoe.grouped_matmul(jnp.ones(shape), w, sizes)
    assert y.shape == (*shape[:2], 5) and not np.asarray(y).any()


class Device:
    def __init__(self, platform: str):
        self.platform = platform


@pytest.mark.parametrize(
    "platform, backend", [("cpu", "blocked"), ("gpu", "batched"), ("tpu", "batched")]
)
def test_auto(platform: str, backend: str):
    device: Any = Device(platform)
    assert products.choose_masked_backend("auto", jnp.bfloat16, (8, 8), device).backend == backend


def test_errors():
    x, w, sizes, _ = draw("some", "float32")
    with pytest.raises(ValueError, match=r"x must be .* or \[L, S, D\].*got \[3, 6, 8\] and \[4, "):
        jaxmoe.grouped_matmul(x[:3], w, sizes)
    with pytest.raises(ValueError, match=r"backend for x \[L, S, D\] must be one of .*'tokamax'"):
        jaxmoe.grouped_matmul(x, w, sizes, backend="tokamax")
