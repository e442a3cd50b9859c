"""The "tokamax" backend: with a stand-in for the library and, where that is installed, with it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmoe
from jaxmoe import layer, products, residuals
from jaxmoe.experts import swiglu_experts
from jaxmoe.products import cuda, tokamax

SIZES = (5, 0, 30, 7)
ROWS, DIM, FEATURES = 45, 16, 24


def stand_in() -> ModuleType:
    """Wants rows in eights, and leaves NaN past the last group."""
    module = ModuleType("tokamax")

    def sizes_of(value: Any, total: int) -> tuple[Any, int]:
        return value, total

    def ragged_dot_general(
        lhs: Any, rhs: Any, sizes: Any, numbers: Any, *, preferred_element_type: Any
    ) -> Any:
        value, total = sizes
        if lhs.shape[0] % 8 or total != lhs.shape[0]:
            raise ValueError(f"{lhs.shape[0]} rows")
        if numbers.dot_dimension_numbers[0][1] == (2,):
            rhs = rhs.mT
        y = lax.ragged_dot(lhs, rhs, value, preferred_element_type=preferred_element_type)
        return jnp.where(jnp.arange(total)[:, None] < value.sum(), y, jnp.nan)

    module.RaggedDotGroupSizes = sizes_of  # type: ignore[attr-defined]
    module.ragged_dot_general = ragged_dot_general  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=["stand-in", "real"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "tokamax", stand_in())
    elif importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed")
    tokamax.why_not.cache_clear()
    yield
    tokamax.why_not.cache_clear()


def draw() -> tuple[Any, ...]:
    """Rows, gate, up, down and sizes; rows that belong to nobody are NaN."""
    rng = np.random.default_rng(0)
    shapes = ((ROWS, DIM), (4, DIM, FEATURES), (4, DIM, FEATURES), (4, FEATURES, DIM))
    rows, *weights = (rng.standard_normal(s, np.float32) for s in shapes)
    rows[sum(SIZES) :] = np.nan
    return jnp.asarray(rows), *map(jnp.asarray, weights), jnp.asarray(SIZES, jnp.int32)


@pytest.mark.usefixtures("library")
def test_products_and_gradients():
    rows, gate, _, _, sizes = draw()
    d_y = jnp.ones((ROWS, FEATURES)).at[sum(SIZES) :].set(jnp.nan)
    results = []
    for backend in ("blocked", "tokamax"):
        y, vjp = jax.vjp(
            jax.jit(lambda x, w, b=backend: jaxmoe.grouped_matmul(x, w, sizes, backend=b)),
            rows,
            gate,
        )
        results.append((y, *vjp(d_y)))
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(results[1][0][sum(SIZES) :], 0)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shared_up", [False, True])
def test_experts(shared_up: bool):
    rows, gate, up, down, sizes = draw()
    rows, up = jnp.nan_to_num(rows), up[:1] if shared_up else up

    def loss(*args: Any, backend: str) -> Any:
        return jnp.sum(swiglu_experts(args[0], sizes, *args[1:], backend=backend) ** 2)

    got, want = (
        jax.jit(jax.grad(lambda *a, b=b: loss(*a, backend=b), argnums=range(4)))(
            rows, gate, up, down
        )
        for b in ("tokamax", "blocked")
    )
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("library")
def test_a_layer_on_several_devices():
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    group = jaxmoe.ExpertParallel(
        mesh, num_experts=8, top_k=2, dim=DIM, max_tokens=32, dtype=jnp.float32
    )
    x = jax.random.normal(jax.random.key(7), (64, DIM))
    results = []
    for backend in ("blocked", "tokamax"):
        config = layer.MoEConfig(group, FEATURES, backend=backend)
        params = {
            name: jax.random.normal(jax.random.key(i), spec.shape)
            for i, (name, spec) in enumerate(layer.param_specs(config).items())
        }
        step = jax.value_and_grad(lambda p, c=config: jnp.sum(layer.moe_layer(c, p, x)[0]))
        results.append(jax.tree.leaves(jax.jit(step)(params)))
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("library", ["stand-in"], indirect=True)
def test_checkpoint_saves_by_name():
    """Of four products forward, two are named; saved, they are not computed again."""
    rows, gate, up, down, sizes = draw()
    counts = []
    for names in ((), (residuals.GATE, residuals.UP)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        def experts(rows: Any, gate: Any) -> Any:
            return swiglu_experts(rows, sizes, gate, up, down, backend="tokamax")

        checkpointed = jax.checkpoint(experts, policy=policy)
        gradient = jax.grad(lambda *a, f=checkpointed: jnp.sum(f(*a)), argnums=(0, 1))
        counts.append(str(jax.make_jaxpr(gradient)(rows, gate)).count("ragged_dot_general["))
    assert counts[0] - counts[1] == 2


def test_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    tokamax.why_not.cache_clear()
    rows, gate, _, _, sizes = draw()
    with pytest.raises(
        RuntimeError,
        match=r"'tokamax' cannot run here: tokamax cannot be imported .*Install jaxmoe\[tokamax\]",
    ):
        jaxmoe.grouped_matmul(rows, gate, sizes, backend="tokamax")
    tokamax.why_not.cache_clear()


class Gpu:
    platform = "gpu"

    def __init__(self, capability: str):
        self.compute_capability = capability


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "capability, dtype, kernels, backend",
    [
        ("9.0", "bfloat16", "", "cuda"),
        ("9.0", "bfloat16", "not built", "tokamax"),
        ("9.0", "float16", "need bfloat16", "tokamax"),
        ("9.0", "float32", "need bfloat16", "blocked"),
        ("8.0", "bfloat16", "need Hopper", "blocked"),
    ],
)
def test_auto_takes_it_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: str, kernels: str, backend: str
):
    monkeypatch.setattr(cuda, "why_not", lambda *_: kernels)
    device: Any = Gpu(capability)
    assert products.choose_backend("auto", jnp.dtype(dtype), (8, 8), device).backend == backend


def test_the_layer_refuses_unknown_backends():
    group = jaxmoe.ExpertParallel(num_experts=4, top_k=2, dim=8, max_tokens=4)
    with pytest.raises(ValueError, match=r"MoE: backend must be one of .*'tokamax'.*, got 'fast'"):
        layer.MoEConfig(group, 8, backend="fast")
