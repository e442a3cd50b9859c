"""Eight-bit expert weights: error bounds in exact arithmetic, the layer, what is read, errors."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import cases
import dense
import exchange
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from dense import layer_config
from flax import nnx

import jaxmoe
from jaxmoe import compress
from jaxmoe.experts import swiglu_experts

L, D, F = 3, 24, 40
KINDS = ("int8", "fp8")
LIMITS = {"int8": 127, "fp8": 448}


def make_weights(name: str = "weights") -> dict[str, np.ndarray]:
    """Normal, with channels of very different size and one of zeros."""
    rng = cases.make_rng(name)
    shapes = {"gate": (L, D, F), "up": (L, D, F), "down": (L, F, D)}
    weights = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    weights["gate"] *= np.float32(10.0) ** rng.integers(-6, 6, (L, 1, F))
    weights["up"][1, :, 2] = 0.0
    return weights


def in_order(weights: dict[str, Any]) -> list[Any]:
    """As `swiglu_experts` takes them; trees come back in the order of the alphabet."""
    return [weights[name] for name in ("gate", "up", "down")]


def exact_errors(weight: np.ndarray, small: Any) -> tuple[list[Fraction], list[Fraction]]:
    """|W - values * scales| and the scales, element by element, as rational numbers."""
    values = np.asarray(small.values).astype(np.float64)  # exact
    scales = np.broadcast_to(np.asarray(small.scales), weight.shape)
    errors, steps = [], []
    for w, v, s in zip(weight.ravel(), values.ravel(), scales.ravel(), strict=True):
        steps.append(Fraction(float(s)))
        errors.append(abs(Fraction(float(w)) - Fraction(float(v)) * steps[-1]))
    return errors, steps


@pytest.mark.parametrize("kind", KINDS)
def test_error_bounds_of_the_docstring_in_exact_arithmetic(kind: str):
    weights = make_weights()
    for name, small in compress.quantize_experts(weights, kind).items():
        weight = weights[name]
        largest = np.abs(weight).max(1, keepdims=True)
        expected = np.maximum(largest / np.float32(LIMITS[kind]), np.finfo(np.float32).tiny)
        np.testing.assert_allclose(small.scales, expected, rtol=2**-22)
        errors, steps = exact_errors(weight, small)
        if kind == "int8":
            bounds = [s * (Fraction(1, 2) + Fraction(1, 2**17)) for s in steps]
        else:
            relative = Fraction(1, 2**4) + Fraction(1, 2**10)
            least = Fraction(1, 2**10) + Fraction(1, 2**19)
            bounds = [
                max(relative * abs(Fraction(float(w))), least * s)
                for w, s in zip(weight.ravel(), steps, strict=True)
            ]
        assert all(e <= b for e, b in zip(errors, bounds, strict=True))
        # And not by a wide margin: the bounds are those of this many bits.
        assert max(e / b for e, b in zip(errors, bounds, strict=True)) > Fraction(9, 10)


def test_what_eight_bits_hold_comes_back_whole():
    values = cases.make_rng("whole").integers(-127, 128, (L, D, F)).astype(np.float32)
    values[:, 0] = 127
    scale = np.float32(2.0) ** np.arange(-F // 2, F - F // 2, dtype=np.float32)
    got = compress.quantize_experts(values * scale, "int8")
    np.testing.assert_array_equal(got.values, values)
    np.testing.assert_array_equal(got.dequantize(), values * scale)

    bits = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    bits = bits[np.isfinite(bits)]  # all 254 numbers of e4m3, 448 among them
    weight = np.broadcast_to(bits[None, :, None] * scale, (L, bits.size, F))
    np.testing.assert_array_equal(compress.quantize_experts(weight, "fp8").dequantize(), weight)


@pytest.mark.parametrize(
    "kind, dtype", [("int8", "float32"), ("fp8", "bfloat16"), ("int8", "float16")]
)
def test_experts_equal_those_of_the_dequantised_weights(kind: str, dtype: str):
    """In float32 up to the order of sums; else each product rounds once to the dtype of the rows,
    three in a row.
    """
    weights = {k: np.asarray(w, np.float32) for k, w in make_weights().items()}
    weights["gate"] = weights["gate"] / np.abs(weights["gate"]).max(1, keepdims=True)
    small = compress.quantize_experts(weights, kind)
    rows = cases.make_rng("rows").standard_normal((37, D)).astype(dtype)
    sizes = np.array([5, 0, 20], np.int32)
    got = jax.jit(swiglu_experts, static_argnames="block_rows")(
        jnp.asarray(rows), jnp.asarray(sizes), *in_order(small), block_rows=8
    )
    assert got.dtype == dtype
    gate, up, down = (np.asarray(w.dequantize(), np.float64) for w in in_order(small))
    want = np.zeros((37, D))
    for row, expert in enumerate(np.repeat(np.arange(L), sizes)):
        a = np.asarray(rows[row], np.float64) @ gate[expert]
        want[row] = (a / (1 + np.exp(-a)) * (np.asarray(rows[row], float) @ up[expert])) @ down[
            expert
        ]
    dense.assert_close(
        got, want, {"float32": 1e-5, "bfloat16": 3 * 2**-8, "float16": 3 * 2**-11}[dtype]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_wide_copy_of_all_experts_is_made(kind: str):
    """The compiled loop widens one expert at a time: no float array has all of them."""
    small = compress.quantize_experts(make_weights(), kind)
    rows, sizes = jnp.ones((16, D), jnp.float32), jnp.array([8, 4, 4], jnp.int32)
    text = jax.jit(swiglu_experts).lower(rows, sizes, *in_order(small)).compile().as_text()
    name = {"int8": "s8", "fp8": "f8e4m3fn"}[kind]
    assert f"{name}[{L},{D},{F}]" in text
    assert not re.search(rf"(f32|f16|bf16)\[{L},({D},{F}|{F},{D})\]", text)


def layer_and_tokens(name: str) -> tuple[jaxmoe.MoE, Any]:
    config = layer_config(name)
    graphdef, state = nnx.split(dense.abstract_layer(config, num_shared_experts=1, use_bias=True))
    state = dense.with_params(state, dense.make_params(state))
    moe = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
    return moe, exchange.place(config, cases.slices_first(config, dense.make_tokens(config)))


@pytest.mark.parametrize("name, kind", [("data_expert", "int8"), ("no_mesh", "fp8")])
def test_layer_equals_the_float_layer_of_the_dequantised_weights(name: str, kind: str):
    moe, x = layer_and_tokens(name)
    small = compress.quantize_layer(moe, kind)
    wide = nnx.clone(moe)
    for key, weight in small.expert_weights.items():
        getattr(wide, key)[...] = weight.dequantize()
    call = nnx.jit(lambda moe, x: moe(x)[0])
    got, want, before = call(small, x), call(wide, x), call(moe, x)
    dense.assert_close(got, want, 1e-5)
    assert float(jnp.abs(got - before).max()) > 1e-4  # the rounding is there
    assert isinstance(moe.gate, nnx.Param) and moe.gate[...].dtype == jnp.float32
    left = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(small, nnx.Param))}
    assert left == {"router", "shared_gate", "shared_up", "shared_down"}


def test_bytes():
    weights = make_weights()
    small = compress.quantize_experts(weights, "int8")
    assert compress.num_bytes(weights) == 4 * 3 * L * D * F
    assert compress.num_bytes(small) == 3 * L * D * F + 4 * L * (F + F + D)


def test_bad_input():
    weights = make_weights()
    quantize = compress.quantize_experts
    with pytest.raises(
        ValueError, match=r"^`quantize_experts`: dtype is 'int4', wanted one of int8"
    ):
        quantize(weights, "int4")
    with pytest.raises(ValueError, match=r"float32\[24, 40\]; wanted floats \[L, I, O\]"):
        quantize(weights["gate"][0], "int8")
    with pytest.raises(ValueError, match=r"int32\[3, 24, 40\]; wanted floats"):
        quantize(weights["gate"].astype(np.int32), "int8")
    with pytest.raises(ValueError, match=r"the weights are int8 already. Quantise the float ones"):
        quantize(quantize(weights, "int8"), "fp8")
    weights["up"][0, 3, 1] = np.nan
    with pytest.raises(ValueError, match=r"holds NaN or infinity. Take a checkpoint from before"):
        quantize(weights, "int8")


def test_derivatives_and_other_backends_are_refused():
    small = compress.quantize_experts(make_weights(), "fp8")
    rows, sizes = jnp.ones((16, D), jnp.float32), jnp.array([8, 4, 4], jnp.int32)

    def loss(rows: Any) -> Any:
        return swiglu_experts(rows, sizes, *in_order(small)).sum()

    with pytest.raises(TypeError, match=r"^swiglu_experts: asked for a derivative, but the weights "
                       r"are quantised \(float8_e4m3fn\) and have none. Train with"):  # fmt: skip
        jax.grad(loss)(rows)
    with pytest.raises(ValueError, match="backend 'ragged_dot' takes no quantised weights"):
        swiglu_experts(rows, sizes, *in_order(small), backend="ragged_dot")
    with pytest.raises(
        ValueError, match=r"gate has shape \[3, 24, 40\], wanted \[2, 24, 40\]: rows"
    ):
        swiglu_experts(rows, sizes[:2], *in_order(small))
