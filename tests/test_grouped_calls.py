"""What JAX makes of the "cuda" backend: its custom calls, and the gradients around them.

On the host the calls are lowered for GPUs but not run; for values, other backends stand in for the
kernels.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import experts, layer, residuals
from jaxmoe.layer_config import param_specs
from jaxmoe.products import cuda, fp8_swiglu, ragged

C, D, F, L = 40, 16, 24, 3


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "why_not", lambda *_: "")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch):
    def swiglu(x: Any, gate: Any, up: Any, group_sizes: Any, *, save: bool) -> list[Any]:
        a, b = (ragged.forward(x, w, group_sizes) for w in (gate, up))
        hidden = fp8_swiglu.activate(a, b).astype(x.dtype)
        return [hidden, a, b] if save else [hidden]

    def input_grad_of_two(d_y: Any, w: Any, d_y2: Any, w2: Any, group_sizes: Any) -> Any:
        return ragged.input_grad(d_y, w, group_sizes) + ragged.input_grad(d_y2, w2, group_sizes)

    for name in ("forward", "input_grad", "weight_grad"):
        monkeypatch.setattr(cuda, name, getattr(ragged, name))
    monkeypatch.setattr(cuda, "input_grad_of_two", input_grad_of_two)
    monkeypatch.setattr(cuda, "swiglu", swiglu)


def draw(dtype: Any) -> tuple[Any, ...]:
    """rows, group_sizes, gate, up, down."""
    rng = np.random.default_rng(0)
    shapes = ((C, D), (L, D, F), (L, D, F), (L, F, D))
    rows, *weights = (jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes)
    return rows, jnp.asarray([5, 0, 30], jnp.int32), *weights


def targets(f: Any, *args: Any) -> Counter[str]:
    """The library's custom calls of a run; those of functions that run twice are counted twice."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    bodies = dict(re.findall(r"func\.func \w+ @(\w+)\((.*?)\n  }", text, re.DOTALL))

    def count(name: str) -> Counter[str]:
        found = Counter(re.findall(r"custom_call @(jaxmoe_\w+)", bodies[name]))
        for callee in re.findall(r"\bcall @(\w+)\(", bodies[name]):
            found += count(callee)
        return found

    return count("main")


def swiglu_experts(*args: Any) -> jax.Array:
    return experts.swiglu_experts(*args, backend="cuda")


def gradient(f: Any) -> Any:
    """Of the sum of f's result, which comes with it, to everything but the sizes."""

    def total(*args: Any) -> jax.Array:
        return jnp.sum(f(*args).astype(jnp.float32))

    return jax.value_and_grad(total, argnums=(0, 2, 3, 4))


def test_calls_of_a_product():
    rows, sizes, gate, *_ = draw(jnp.bfloat16)

    def product(rows, gate):
        return jaxmoe.grouped_matmul(rows, gate, sizes, backend="cuda")

    def train(rows, gate):
        y, vjp = jax.vjp(product, rows, gate)
        return vjp(y)

    assert targets(product, rows, gate) == {"jaxmoe_grouped_matmul": 1}
    assert targets(train, rows, gate) == {
        "jaxmoe_grouped_matmul": 1,
        "jaxmoe_grouped_input_grad": 1,
        "jaxmoe_grouped_weight_grad": 1,
    }


def test_calls_of_the_experts():
    args = draw(jnp.bfloat16)
    assert targets(swiglu_experts, *args) == {
        "jaxmoe_grouped_swiglu": 1,
        "jaxmoe_grouped_matmul": 1,
    }
    assert targets(gradient(swiglu_experts), *args) == {
        "jaxmoe_grouped_swiglu_saving": 1,
        "jaxmoe_grouped_matmul": 1,
        "jaxmoe_grouped_input_grad": 1,
        "jaxmoe_grouped_input_grad_of_two": 1,
        "jaxmoe_grouped_weight_grad": 3,
    }


def test_calls_of_experts_in_fp8():
    """Widths that FP8 rows can have; a width of 24 leaves "auto" the loop."""
    rows, sizes, *weights = draw(jnp.bfloat16)
    widened = [jnp.pad(w, [(0, 0), *((0, -n % 16) for n in w.shape[1:])]) for w in weights]

    def in_fp8(rows: Any, sizes: Any, *weights: Any) -> Any:
        blocks = [jaxmoe.quantize_blocks(w, keep_master=True) for w in weights]
        return experts.swiglu_experts(rows, sizes, *blocks)

    assert targets(in_fp8, rows, sizes, *widened) == {"jaxmoe_grouped_fp8": 3}
    assert targets(gradient(in_fp8), rows, sizes, *widened) == {
        "jaxmoe_grouped_fp8": 3,
        "jaxmoe_grouped_input_grad": 1,
        "jaxmoe_grouped_input_grad_of_two": 1,
        "jaxmoe_grouped_weight_grad": 3,
    }
    assert not targets(in_fp8, rows, sizes, *weights)


def test_calls_of_a_layer_with_rows_and_experts_in_fp8():
    """Rows pass from call to call: the hidden ones alone are quantised on the way."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    group = jaxmoe.ExpertParallel(
        mesh,
        num_experts=2 * L,
        top_k=2,
        dim=D,
        max_tokens=8,
        transport="cpu",
        wire_dtype=jnp.float8_e4m3fn,
        rows_dtype=jnp.float8_e4m3fn,
    )
    config = layer.MoEConfig(group, 2 * D)
    params = {
        name: jnp.zeros(spec.shape, jnp.bfloat16) for name, spec in param_specs(config).items()
    }
    params |= {name: jaxmoe.quantize_blocks(params[name]) for name in ("gate", "up", "down")}
    call = lambda p, x: layer.moe_layer(config, p, x)[0]  # noqa: E731
    x = jnp.zeros((16, D), jnp.bfloat16)
    assert targets(call, params, x) == {
        "jaxmoe_dispatch_fp8_rows": 1,
        "jaxmoe_grouped_fp8": 3,
        "jaxmoe_combine": 1,
    }
    text = jax.jit(call).trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    made = re.findall(r"-> tensor<([0-9x]+)xf8E4M3FN>", text)
    assert set(made) == {f"32x{2 * D}"}


@pytest.mark.parametrize("save", [False, True])
def test_checkpoint_saves_by_name(save: bool):
    """Saved, gate and up are not computed again for the gradient."""
    args = draw(jnp.bfloat16)
    names = (residuals.GATE, residuals.UP) if save else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    found = targets(gradient(jax.checkpoint(swiglu_experts, policy=policy)), *args)
    assert found["jaxmoe_grouped_swiglu"] + found["jaxmoe_grouped_swiglu_saving"] == 2 - save


def test_checkpoint_of_a_layer_saves_by_name():
    """The names reach through the layer's own `jax.shard_map`; without one, its part runs again."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    group = jaxmoe.ExpertParallel(
        mesh, num_experts=2 * L, top_k=2, dim=D, max_tokens=8, transport="cpu"
    )
    config = layer.MoEConfig(group, F, backend="cuda")
    params = {
        name: jnp.zeros(spec.shape, jnp.bfloat16) for name, spec in param_specs(config).items()
    }

    def calls(names: tuple[str, ...]) -> tuple[int, ...]:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        apply = jax.checkpoint(lambda p, x: layer.moe_layer(config, p, x)[0], policy=policy)
        loss = lambda p, x: jnp.sum(apply(p, x).astype(jnp.float32))  # noqa: E731
        found = targets(
            jax.value_and_grad(loss, argnums=(0, 1)), params, jnp.zeros((16, D), jnp.bfloat16)
        )
        swiglu = found["jaxmoe_grouped_swiglu"] + found["jaxmoe_grouped_swiglu_saving"]
        return found["jaxmoe_dispatch"], swiglu, found["jaxmoe_grouped_matmul"]

    r = residuals
    assert calls(()) == (2, 2, 2)
    assert calls((r.GATE, r.UP)) == (2, 2, 2)
    assert calls((r.GATE, r.UP, r.EXPERT_ROWS)) == (2, 1, 1)
    assert calls((r.PLAN, r.ROWS)) == (1, 2, 2)
    assert calls(r.NAMES) == (1, 1, 1)


@pytest.mark.usefixtures("stand_ins")
def test_gradients_of_the_experts():
    args = draw(jnp.float32)
    got = jax.jit(gradient(swiglu_experts))(*args)
    want = gradient(lambda *a: experts.swiglu_experts(*a, backend="blocked"))(*args)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def test_calls_in_shard_map():
    """Weights that devices share: the calls vary over the mesh, and their gradient is summed."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    rows, sizes, gate, *_ = draw(jnp.bfloat16)

    def loss(rows, gate):
        product = jax.shard_map(
            lambda x, w: jaxmoe.grouped_matmul(x, w, sizes // 2, backend="cuda"),
            mesh=mesh,
            in_specs=(spec("data"), spec()),
            out_specs=spec("data"),
        )
        return jnp.sum(product(rows, gate).astype(jnp.float32))

    found = targets(jax.grad(loss, argnums=(0, 1)), rows, gate)
    assert found["jaxmoe_grouped_input_grad"] == found["jaxmoe_grouped_weight_grad"] == 1
