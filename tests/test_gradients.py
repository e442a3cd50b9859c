"""Gradients of dispatch and combine: closed form, autodiff of a dense form, transposes, NaN."""

import cases
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, CONFIGS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmoe

TRANSPORTS = ("cpu", "xla")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_closed_form(case: Case, transport: str):
    got, want = exchange.outputs_of(case, transport), exchange.specified(case)
    for name in ("d_x", "d_weights", "d_expert_rows", "d_combine_weights"):
        np.testing.assert_array_equal(got[name].astype(np.float64), want[name], err_msg=name)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("plain", "eight_devices")], ids=str
)
def test_choices_without_a_row_take_no_weight_gradient(case: Case):
    """Dropped, masked and invalid ones alike, though every row's cotangent is not zero."""
    inputs = dict(exchange.inputs_of(case))
    inputs["d_row_weights"] = np.ones_like(inputs["d_row_weights"])
    got = exchange.run(case.config, "cpu", inputs)
    kept = (got["row_map"] >= 0).any(axis=1)  # on some device; [S, R, T, K]
    np.testing.assert_array_equal(got["d_weights"], kept.astype(np.float32))
    if case.routing in ("masked", "invalid", "all_masked"):
        assert not kept.all()


def moe_program(config: cases.Config, transport: str):
    """Experts that scale: sum of `cotangent * y` and its gradients by x, weights and the scales."""
    group = exchange.make_group(config, transport)

    def loss(x, ids, weights, scales, cotangent):
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        expert = jnp.searchsorted(
            jnp.cumsum(plan.group_sizes), jnp.arange(config.C, dtype=jnp.int32), side="right"
        )
        expert = jnp.minimum(expert, config.L - 1)
        y = jaxmoe.combine(group, rows * scales[expert][:, None], row_weights, plan)
        return jnp.sum(y * cotangent)

    def body(*args):
        return jax.grad(loss, argnums=(0, 2, 3))(*args)

    return jax.jit(exchange.on_devices(config, body))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("routing", ["uniform", "zipf", "invalid", "duplicates"])
def test_composition_equals_autodiff_of_a_dense_form(routing: str, transport: str):
    """Without drops y = sum_e (sum of the weights of e) * scale_e * x, with nothing dispatched."""
    config = CONFIGS["plain"]
    rng = cases.make_rng(f"dense-{routing}")
    lead = (1, config.R, config.T)
    ids = cases.ROUTINGS[routing](rng, config)
    x, cotangent = (cases.integers(rng, (*lead, config.D), "float32") for _ in range(2))
    weights = cases.integers(rng, (*lead, config.K), "float32")
    scales = cases.integers(rng, (1, config.R, config.L), "float32")

    def dense(x, weights, scales):
        chosen = jax.nn.one_hot(ids, config.E, dtype=jnp.float32)  # zeros for ids out of range
        per_expert = jnp.einsum("srtke,srtk->srte", chosen, weights)
        scaled = per_expert @ scales.reshape(-1)
        return jnp.sum(scaled[..., None] * x * cotangent)

    want = jax.grad(dense, argnums=(0, 1, 2))(x, weights, scales)
    program = moe_program(config, transport)
    got = program(*(exchange.place(config, a) for a in (x, ids, weights, scales, cotangent)))
    for g, w in zip(exchange.fetch(config, got), want, strict=True):
        np.testing.assert_array_equal(g, w)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["plain", "two_devices_f16", "expert_data_tiny"]),
    routing=st.sampled_from(sorted(cases.ROUTINGS)),
)
def test_gradients_are_transposes(seed: int, name: str, routing: str):
    """<dispatch(x, w), (a, b)> = <(x, w), dispatch^T(a, b)>, and for combine. Exact on integers."""
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    ids = cases.ROUTINGS[routing](rng, config)
    i = exchange.make_inputs(config, ids, rng, cases.integers)
    o = exchange.run(config, "cpu", i)

    def inner(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.nansum(a.astype(np.float64) * b.astype(np.float64)))  # NaN: unused rows

    forward = inner(o["rows"], i["d_rows"]) + inner(o["row_weights"], i["d_row_weights"])
    backward = inner(i["x"], o["d_x"]) + inner(i["weights"], o["d_weights"])
    assert forward == backward
    # Combine is linear in its rows and in its weights.
    assert inner(o["y"], i["d_y"]) == inner(i["expert_rows"], o["d_expert_rows"])
    assert inner(o["y"], i["d_y"]) == inner(o["row_weights"], o["d_combine_weights"])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["plain", "no_mesh_drops"])
def test_nan_weight_of_a_choice_without_a_row_stays_away(name: str, transport: str):
    case = Case(name, "masked" if name == "plain" else "zipf")
    want = exchange.specified(case)
    kept = (want["row_map"] >= 0).any(axis=1)
    assert not kept.all()
    inputs = dict(exchange.inputs_of(case))
    inputs["weights"] = np.where(kept, inputs["weights"], np.float32(np.nan))
    got = exchange.run(case.config, transport, inputs)
    for output in want:
        assert not np.isnan(got[output].astype(np.float32)).any(), output
        np.testing.assert_array_equal(got[output].astype(np.float64), want[output], output)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nan_token_stays_in_its_rows(transport: str):
    """A NaN token makes its own rows NaN, and nothing else."""
    case = Case("plain", "uniform")
    want = exchange.specified(case)
    inputs = dict(exchange.inputs_of(case))
    x = inputs["x"].copy()
    x[0, 1, 2] = np.nan
    got = exchange.run(case.config, transport, {**inputs, "x": x})
    source = (1 * case.config.T + 2) * case.config.K
    poisoned = np.isin(want["row_source"], range(source, source + case.config.K))
    assert poisoned.sum() == case.config.K
    np.testing.assert_array_equal(np.isnan(got["rows"]), poisoned[..., None] & np.ones(8, bool))
    np.testing.assert_array_equal(got["rows"][~poisoned], want["rows"][~poisoned])
