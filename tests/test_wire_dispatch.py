"""Dispatch with an FP8 wire: rows in FP8, numbers that are not finite, gradients, the program."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import cases
import dense
import exchange
import fp8
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, CONFIGS, Case, Config
from flax import nnx
from test_transports import assert_same_bits, floats

import jaxmoe
from jaxmoe import wire

TRANSPORTS = ("cpu", "xla")
WIRE_CASES = [c for c in CASES if c.config.wire is not None]


@functools.cache
def dispatch_program(config: Config, transport: str, mode: str = "auto") -> Any:
    group = exchange.make_group(config, transport, mode)

    def body(x: Any, ids: Any, weights: Any) -> Any:
        rows, _, plan = jaxmoe.dispatch(group, x, ids, weights)
        return rows, plan

    return jax.jit(exchange.on_devices(config, body))


def dispatched(config: Config, transport: str, inputs: exchange.Arrays, mode: str = "auto") -> Any:
    placed = [exchange.place(config, inputs[name]) for name in ("x", "ids", "weights")]
    return exchange.fetch(config, dispatch_program(config, transport, mode)(*placed))


def float_inputs(case: Case, config: Config) -> exchange.Arrays:
    """Numbers of all sizes, some of them NaN or infinite."""
    rng = cases.make_rng(case)
    inputs = exchange.make_inputs(config, cases.ROUTINGS[case.routing](rng, config), rng, floats)
    x = inputs["x"] * (10.0 ** rng.integers(-3, 4, inputs["x"].shape)).astype(inputs["x"].dtype)
    odd = rng.choice([np.nan, np.inf, -np.inf], x.shape).astype(x.dtype)
    return {**inputs, "x": np.where(rng.random(x.shape) < 0.002, odd, x)}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", WIRE_CASES, ids=str)
def test_rows_in_fp8(case: Case, transport: str):
    """Values and scales are those of the definition, in their places, and zero behind the last."""
    config = dataclasses.replace(case.config, fp8_rows=True)
    inputs = float_inputs(case, config)
    rows, plan = dispatched(config, transport, inputs)
    assert isinstance(rows, jaxmoe.QuantizedRows)
    num_blocks = -(-config.D // 128)
    for s in range(config.num_slices):
        codes, scales = fp8.from_definition(inputs["x"][s].reshape(-1, config.D), config.wire)
        special = np.repeat(scales < 0, 128, axis=1)[:, : config.D]
        codes = np.where(special & (codes == 0x80), np.uint8(0x7F), codes)
        for d in range(config.R):
            num, source = plan.num_rows[s, d], plan.row_source[s, d]
            token = source[:num] // config.K
            want = np.zeros((config.C, config.D), np.uint8)
            want_scales = np.zeros((config.C, num_blocks), np.float32)
            want[:num], want_scales[:num] = codes[token], np.abs(scales[token])
            assert rows.values.dtype == fp8.E4M3
            np.testing.assert_array_equal(rows.values[s, d].view(np.uint8), want)
            assert_same_bits(rows.scales[s, d], want_scales, "scales")


@pytest.mark.parametrize("case", WIRE_CASES, ids=str)
def test_odd_numbers_come_out_where_they_were(case: Case):
    """NaN and both infinities, of the own and of other devices; both transports alike."""
    config, inputs = case.config, float_inputs(case, case.config)
    (got, plan), (want, _) = (dispatched(config, t, inputs) for t in TRANSPORTS)
    assert_same_bits(got, want, "rows")
    used = plan.row_source >= 0
    for s in range(config.num_slices):
        x = inputs["x"][s].reshape(-1, config.D).astype(np.float32)
        came = x[np.maximum(plan.row_source[s], 0) // config.K]
        rows = got[s].astype(np.float32)
        finite = np.isfinite(came) | ~used[s][..., None]
        np.testing.assert_array_equal(rows[~finite], came[~finite])
        assert np.isfinite(rows[finite]).all()
    if config.D * config.T > 1000:
        assert np.isnan(got.astype(np.float32)).any() and np.isinf(got.astype(np.float32)).any()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradient_is_that_of_the_copy(transport: str):
    """As without FP8 on the wire, though the rows are others."""
    case = Case("wire", "uniform")
    plain = dataclasses.replace(case.config, wire=None)
    rng = cases.make_rng("gradient")
    ids = cases.ROUTINGS[case.routing](rng, plain)
    inputs = exchange.make_inputs(plain, ids, rng, floats)
    got, want = (exchange.run(c, transport, inputs) for c in (case.config, plain))
    assert (got["rows"] != want["rows"]).any()
    for name in ("d_x", "d_weights", "d_expert_rows", "d_combine_weights"):
        assert_same_bits(got[name], want[name], name)


def lowered(config: Config, transport: str) -> Any:
    lead = (config.num_slices, config.R, config.T)
    x = np.zeros((*lead, config.D), jnp.dtype(config.dtype))
    ids, weights = np.zeros((*lead, config.K), np.int32), np.zeros((*lead, config.K), np.float32)
    placed = [exchange.place(config, a) for a in (x, ids, weights)]
    return dispatch_program(config, transport).lower(*placed)


@pytest.mark.parametrize("fp8_rows", [False, True])
def test_dispatch_is_one_call(fp8_rows: bool):
    """Which quantises and makes rows by itself."""
    config = dataclasses.replace(CONFIGS["wire"], fp8_rows=fp8_rows)
    hlo = lowered(config, "cpu").compile().as_text()
    calls = re.findall(r'custom_call_target="(\w+)"', hlo)
    assert calls == ["jaxmoe_dispatch_fp8_rows" if fp8_rows else "jaxmoe_dispatch"]
    assert not re.search(r"all-gather|all-to-all", hlo)


def test_collectives_carry_eight_bits():
    """With transport "xla" the tokens themselves cross in no other dtype."""
    config = CONFIGS["wire"]
    text = lowered(config, "xla").as_text()
    gathered = re.findall(r'"?stablehlo.all_gather"?.*?: \(tensor<([^>]*)>\)', text, re.DOTALL)
    assert f"1x{config.T}x{config.D}xui8" in gathered
    assert f"1x{config.T}x{-(-config.D // 128)}xf32" in gathered
    assert not any("bf16" in shape for shape in gathered)


def test_fp8_rows_have_no_gradient():
    config = dataclasses.replace(CONFIGS["wire_no_mesh"], fp8_rows=True)
    group = exchange.make_group(config, "cpu")

    def loss(x: Any) -> Any:
        ids, weights = jnp.zeros((6, 2), jnp.int32), jnp.ones((6, 2))
        rows, _, _ = jaxmoe.dispatch(group, x, ids, weights)
        return jnp.sum(rows.dequantize())

    with pytest.raises(TypeError, match=r"derivative, but rows_dtype is float8_e4m3fn.*without"):
        jax.grad(loss)(jnp.ones((6, 32), jnp.bfloat16))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(wire_dtype="int8"),
         r"wire_dtype must be float8_e4m3fn or None \(as dtype, float32\), got int8"),
        (dict(wire_dtype=jnp.float8_e5m2), "wire_dtype must be float8_e4m3fn.*got float8_e5m2"),
        (dict(wire_dtype=fp8.E4M3, rows_dtype="bfloat16"), "rows_dtype must be .*got bfloat16"),
        (dict(rows_dtype=fp8.E4M3),
         "wire_dtype is float32. Set wire_dtype=jnp.float8_e4m3fn as well"),
        (dict(wire_dtype=fp8.E4M3, wire_scale="max"),
         "wire_scale must be one of 'amax', 'power_of_two', got 'max'"),
        (dict(wire_scale="power_of_two"), "is of an FP8 wire, but wire_dtype is float32"),
    ],
)  # fmt: skip
def test_bad_options(changes: dict[str, Any], sentence: str):
    sizes = dict(num_experts=8, top_k=2, dim=4, max_tokens=6, dtype="float32")
    with pytest.raises(ValueError, match=f"^ExpertParallel: .*{sentence}"):
        jaxmoe.ExpertParallel(**{**sizes, **changes})


def test_options_of_a_group():
    sizes = dict(num_experts=8, top_k=2, dim=4, max_tokens=6)
    plain = jaxmoe.ExpertParallel(**sizes, wire_dtype=jnp.bfloat16, rows_dtype=jnp.bfloat16)
    assert plain.wire_dtype is None and plain.rows_dtype is None
    assert "wire" not in repr(plain)
    group = jaxmoe.ExpertParallel(**sizes, wire_dtype=wire.DTYPE, rows_dtype=jnp.float8_e4m3fn)
    assert group.wire_dtype == group.rows_dtype == jnp.float8_e4m3fn
    assert "wire_dtype=float8_e4m3fn, wire_scale='amax', rows_dtype=float8_e4m3fn" in repr(group)


def test_layer_computes_in_its_own_dtype():
    """Of rows that were quantised: y changes, by no more than twice a row's bound."""
    config = dense.layer_config("data_expert", D=32, check_vma=True)
    x = dense.make_tokens(config)
    outputs = []
    for rule in (None, "amax", "power_of_two"):
        layer = dense.make_layer(dataclasses.replace(config, wire=rule))
        graphdef, state = nnx.split(layer)
        state = dense.with_params(state, dense.make_params(state))
        program = jax.jit(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x)[0])
        outputs.append(np.asarray(program(state, x)))
    plain, *quantized = outputs
    for y in quantized:
        error = np.abs(y - plain).max()
        assert 0 < error < 2.0**-3 * np.abs(plain).max()
