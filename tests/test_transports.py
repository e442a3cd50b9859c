"""`transport="cpu"` gives the bits of `transport="xla"`, and the same ones in every run."""

import hashlib

import cases
import exchange
import jax.numpy as jnp
import numpy as np
import pytest
import spec
from cases import CASES, CONFIGS, SMOKE, Case

FLOAT_CASES = [
    Case("plain", "zipf"),
    Case("two_devices_f16", "zipf"),
    Case("eight_devices", "invalid"),
    Case("data_expert", "masked"),
    Case("no_mesh", "uniform"),
    Case("large", "zipf"),
    Case("large_drops", "zipf"),
]
# Sums of products: XLA may fuse a product with a sum, and dots may be summed in any order.
SUMS = ("y", "d_combine_weights")


def assert_same_bits(got: np.ndarray, want: np.ndarray, name: str) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape), name
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(unsigned), want.view(unsigned), err_msg=name)


def floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


def float_inputs(case: Case) -> exchange.Arrays:
    rng = cases.make_rng(case)
    ids = cases.ROUTINGS[case.routing](rng, case.config)
    return exchange.make_inputs(case.config, ids, rng, floats)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.smoke if c in SMOKE else (), id=str(c)) for c in CASES],
)
def test_integers_give_the_same_bits(case: Case):
    got, want = exchange.outputs_of(case, "cpu"), exchange.outputs_of(case, "xla")
    for name in want:
        if name == "d_expert_rows" or name in SUMS:  # -0 equals 0: sums of zeros may differ in sign
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        else:
            assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_floats_give_the_same_bits(case: Case):
    inputs = float_inputs(case)
    got = exchange.run(case.config, "cpu", inputs)
    want = exchange.run(case.config, "xla", inputs)
    for name in set(want) - set(SUMS):
        assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_combine_sums_in_the_documented_order(case: Case):
    """The CPU transport: bit for bit. XLA: each of the K + R roundings off by one unit at most."""
    config, inputs = case.config, float_inputs(case)
    got = {t: exchange.run(config, t, inputs)["y"] for t in ("cpu", "xla")}
    weights = exchange.specify(config, inputs)["row_weights"]
    rows = inputs["expert_rows"]
    for s in range(config.num_slices):
        ids = inputs["ids"][s]
        want = spec.rounded_combine(config, ids, rows[s], weights[s])
        assert_same_bits(got["cpu"][s], want, "y")
        magnitude = spec.combine(config, ids, np.abs(rows[s]), np.abs(weights[s]))
        wire = float(jnp.finfo(config.dtype).eps) * magnitude  # where it falls on another side
        bound = wire + (config.K + config.R) * np.finfo(np.float32).eps * magnitude
        error = np.abs(got["xla"][s].astype(np.float64) - want.astype(np.float64))
        assert (error <= bound).all()


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_weight_gradients_agree(case: Case):
    """A dot of D products, summed in two different orders: D roundings of the sum of magnitudes."""
    config, inputs = case.config, float_inputs(case)
    absolute = {
        **inputs,
        "d_y": np.abs(inputs["d_y"]),
        "expert_rows": np.abs(inputs["expert_rows"]),
    }
    magnitude = exchange.specify(config, absolute)["d_combine_weights"]
    want = exchange.specify(config, inputs)["d_combine_weights"]
    for transport in ("cpu", "xla"):
        got = exchange.run(config, transport, inputs)["d_combine_weights"]
        assert (np.abs(got - want) <= config.D * np.finfo(np.float32).eps * magnitude).all()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["data_expert", "large"])
def test_repeated_calls_give_the_same_bits(name: str):
    inputs = float_inputs(Case(name, "zipf"))
    config = CONFIGS[name]
    placed = [exchange.place(config, a) for a in inputs.values()]
    program, hashes = exchange.compiled(config, "cpu"), set()
    for _ in range(50):
        outputs = exchange.fetch(config, program(*placed))
        digest = hashlib.sha256()
        for output in outputs.values():
            digest.update(output.tobytes())
        hashes.add(digest.hexdigest())
    assert len(hashes) == 1
