"""Invariants of dispatch and combine that hold for every input, on the CPU transport."""

import cases
import exchange
import numpy as np
from cases import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ["plain", "two_devices_f16", "eight_devices", "expert_data_tiny", "no_mesh_drops"]
any_input = given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(NAMES),
    routing=st.sampled_from(sorted(cases.ROUTINGS)),
)
examples = settings(max_examples=30, deadline=None)


def run(seed: int, name: str, routing: str):
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    ids = cases.ROUTINGS[routing](rng, config)
    inputs = exchange.make_inputs(config, ids, rng, cases.integers)
    return config, inputs, exchange.run(config, "cpu", inputs)


@examples
@any_input
def test_counts_add_up(seed: int, name: str, routing: str):
    config, inputs, out = run(seed, name, routing)
    ids = inputs["ids"]
    valid = (ids >= 0) & (ids < config.E)
    np.testing.assert_array_equal(out["group_sizes"].sum(-1), out["num_rows"])
    np.testing.assert_array_equal(
        (out["num_rows"] + out["num_dropped"]).sum(-1), valid.sum((1, 2, 3))
    )
    np.testing.assert_array_equal(out["num_invalid"], (~valid & (ids != -1)).sum((2, 3)))
    np.testing.assert_array_equal((out["row_map"] >= 0).sum((2, 3, 4)), out["num_rows"])
    assert (out["num_rows"] <= config.C).all()
    dropping = out["num_dropped"] > 0
    assert (out["num_rows"][dropping] == config.C).all()  # nothing is dropped while there is room


@examples
@any_input
def test_slots_are_a_bijection(seed: int, name: str, routing: str):
    """row_source and row_map are each other's inverse, and no choice has two rows."""
    config, _, out = run(seed, name, routing)
    for s in range(config.num_slices):
        for d in range(config.R):
            num = out["num_rows"][s, d]
            source, row_map = out["row_source"][s, d], out["row_map"][s, d].reshape(-1)
            assert (source[num:] == -1).all()
            np.testing.assert_array_equal(row_map[source[:num]], np.arange(num))
        assert ((out["row_map"][s] >= 0).sum(0) <= 1).all()


@examples
@any_input
def test_rows_are_in_order(seed: int, name: str, routing: str):
    """(local expert, source device, token, choice) grows strictly; the tail is zero."""
    config, inputs, out = run(seed, name, routing)
    for s in range(config.num_slices):
        ids = inputs["ids"][s].reshape(-1)
        for d in range(config.R):
            num = out["num_rows"][s, d]
            source = out["row_source"][s, d, :num].astype(np.int64)
            key = ids[source].astype(np.int64) * ids.size + source
            assert (np.diff(key) > 0).all()
            assert not out["rows"][s, d, num:].any()
            assert not out["row_weights"][s, d, num:].any()


@examples
@any_input
def test_permuting_devices_permutes_results(seed: int, name: str, routing: str):
    """Devices and their experts trade places: each finds the same group sizes and outputs there.

    With drops the survivors depend on the devices' order, which breaks ties, so counts only.
    """
    config, inputs, out = run(seed, name, routing)
    order = np.random.default_rng(seed + 1).permutation(config.R)  # new device d was order[d]
    place = np.argsort(order)
    ids = inputs["ids"]
    valid = (ids >= 0) & (ids < config.E)
    moved = (
        place[np.where(valid, ids, 0) // config.L] * config.L + np.where(valid, ids, 0) % config.L
    )
    swapped = {
        "x": inputs["x"],
        "ids": np.where(valid, moved, ids).astype(np.int32),
        "weights": inputs["weights"],
        "d_y": inputs["d_y"],
    }
    swapped = {key: a[:, order] for key, a in swapped.items()}
    rows = np.zeros_like(inputs["expert_rows"])
    zeros = {"expert_rows": rows, "d_rows": rows, "d_row_weights": np.zeros(rows.shape[:3], "f4")}
    names = list(inputs)
    got = exchange.run(config, "cpu", {n: {**swapped, **zeros}[n] for n in names})
    np.testing.assert_array_equal(got["num_rows"], out["num_rows"][:, order])
    np.testing.assert_array_equal(got["num_dropped"], out["num_dropped"][:, order])
    if not out["num_dropped"].any():
        np.testing.assert_array_equal(got["group_sizes"], out["group_sizes"][:, order])
        back = got["row_map"][:, place][:, :, place]  # [S, device, source, T, K] as before
        np.testing.assert_array_equal(back >= 0, out["row_map"] >= 0)


@examples
@any_input
def test_identity_experts_return_the_tokens(seed: int, name: str, routing: str):
    """combine(dispatch(x)) = x times the sum of the weights of the choices that were kept."""
    config, inputs, out = run(seed, name, routing)
    rows = {**inputs, "expert_rows": out["rows"]}
    y = exchange.run(config, "cpu", rows)["y"]
    kept = (out["row_map"] >= 0).any(axis=1)
    want = inputs["x"] * (inputs["weights"] * kept).sum(-1, keepdims=True)
    np.testing.assert_array_equal(y.astype(np.float32), want.astype(np.float32))
