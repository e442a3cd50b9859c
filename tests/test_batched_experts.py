"""Experts with few rows each in one batched product: equal to the loop over blocks, no loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import compress, layer
from jaxmoe.experts import swiglu_experts
from jaxmoe.products import Choice, batched

CAPACITY, DIM, HIDDEN, MOST = 24, 12, 20, 8
SIZES = {
    "even": (4, 4, 4, 4),
    "skewed": (8, 0, 1, 3),
    "full": (8, 8, 0, 8),
    "none": (0, 0, 0, 0),
    "last": (0, 0, 0, 5),
}


def draw(dtype: Any = jnp.float32, shared_up: bool = False) -> tuple[Any, Any]:
    """Rows, NaN in those that belong to nobody included, and the weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((4, DIM, HIDDEN), (1 if shared_up else 4, DIM, HIDDEN), (4, HIDDEN, DIM))
    weights = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
    return jax.random.normal(keys[3], (CAPACITY, DIM), dtype), weights


@pytest.mark.parametrize("shared_up", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_are_those_of_the_loop(name: str, shared_up: bool):
    rows, weights = draw(shared_up=shared_up)
    sizes = jnp.array(SIZES[name], jnp.int32)
    rows = rows.at[sum(SIZES[name]) :].set(jnp.nan)
    d_y = jax.random.normal(jax.random.key(9), rows.shape)
    results = []
    for backend, options in (("blocked", {"block_rows": 4}), ("batched", {"max_rows": MOST})):
        y, vjp = jax.vjp(
            lambda rows, *w, b=backend, o=options: swiglu_experts(rows, sizes, *w, backend=b, **o),
            jnp.nan_to_num(rows) if backend == "blocked" else rows,
            *weights,
        )
        results.append((y, *vjp(d_y)))
    for want, got in zip(*results, strict=True):
        # Sums over 12 and 20 elements in another order.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(results[1][0][sum(SIZES[name]) :], 0)


def test_more_rows_than_were_announced_are_not_lost_silently():
    rows, weights = draw()
    call = jax.jit(swiglu_experts, static_argnames=("backend", "max_rows"))
    sizes = jnp.array([4, 9, 0, 0], jnp.int32)
    assert bool(jnp.isnan(call(rows, sizes, *weights, backend="batched", max_rows=8)).all())
    y = call(rows, sizes, *weights, backend="batched", max_rows=9)
    np.testing.assert_allclose(y, swiglu_experts(rows, sizes, *weights), rtol=1e-5, atol=1e-4)


def test_there_is_no_loop():
    rows, weights = draw(jnp.bfloat16)
    sizes = jnp.array(SIZES["even"], jnp.int32)
    # Slices at places that depend on the data are what the loop over blocks reads and writes by.
    texts = [
        jax.jit(swiglu_experts, static_argnames=("backend", "max_rows"))
        .lower(rows, sizes, *weights, backend=backend, max_rows=MOST)
        .as_text()
        for backend in ("blocked", "batched")
    ]
    assert "dynamic_slice" in texts[0] and "dynamic_slice" not in texts[1]
    assert texts[1].count("dot_general") == 3


@pytest.mark.parametrize("max_rows", [None, 0])
def test_it_must_know_how_many_rows(max_rows: int | None):
    rows, weights = draw()
    with pytest.raises(ValueError, match=rf"needs max_rows of at least 1.*got {max_rows}"):
        swiglu_experts(
            rows, jnp.zeros(4, jnp.int32), *weights, backend="batched", max_rows=max_rows
        )


def test_quantised_weights_are_refused():
    rows, weights = draw()
    named = dict(zip(("gate", "up", "down"), weights, strict=True))
    small = compress.quantize_experts(named, "int8")
    with pytest.raises(ValueError, match="takes no quantised weights"):
        swiglu_experts(
            rows,
            jnp.zeros(4, jnp.int32),
            *(small[name] for name in named),
            backend="batched",
            max_rows=MOST,
        )


@pytest.mark.parametrize(
    ("platform", "chosen", "num_tokens", "backend"),
    [
        ("gpu", "blocked", batched.MAX_ROWS // 2, "batched"),
        ("gpu", "blocked", batched.MAX_ROWS // 2 + 1, "blocked"),
        ("gpu", "cuda", 4, "cuda"),
        ("gpu", "cuda", 1, "cuda"),
        ("cpu", "blocked", 4, "blocked"),
    ],
)
def test_the_layer_takes_it_on_gpus_for_few_tokens(
    monkeypatch: pytest.MonkeyPatch, platform: str, chosen: str, num_tokens: int, backend: str
):
    """And gives what it gives with the loop."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    group = jaxmoe.ExpertParallel(
        mesh, num_experts=8, top_k=2, dim=DIM, max_tokens=256, dtype=jnp.float32
    )
    taken = []

    def spy(*args: Any, backend: str, **options: Any) -> Any:
        taken.append(backend)
        backend = "blocked" if backend == "cuda" else backend
        return swiglu_experts(*args, backend=backend, **options)

    monkeypatch.setattr(layer, "swiglu_experts", spy)
    config = layer.MoEConfig(group, HIDDEN)
    params = {
        name: jax.random.normal(jax.random.key(i), spec.shape)
        for i, (name, spec) in enumerate(layer.param_specs(config).items())
    }
    x = jax.random.normal(jax.random.key(7), (2 * num_tokens, DIM))
    want, _ = jax.jit(lambda x: layer.moe_layer(config, params, x))(x)
    monkeypatch.setattr(layer, "choose_backend", lambda *_: Choice(chosen, "a test"))
    monkeypatch.setattr(layer, "_platform", lambda _: platform)
    got, _ = jax.jit(lambda x: layer.moe_layer(config, params, x))(x)
    assert taken[0] == "blocked" and set(taken[1:]) == {backend}
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
