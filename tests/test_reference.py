"""`transport="xla"` against the contract written out in loops (tests/spec.py). Exact."""

import cases
import exchange
import numpy as np
import pytest
from cases import CASES, CONFIGS, Case

DISPATCH_OUTPUTS = (
    "rows",
    "row_weights",
    "group_sizes",
    "num_rows",
    "num_dropped",
    "num_invalid",
    "row_map",
    "row_source",
    "choice_device",
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch_is_the_contract(case: Case):
    got, want = exchange.outputs_of(case, "xla"), exchange.specified(case)
    for name in DISPATCH_OUTPUTS:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_combine_is_the_contract(case: Case):
    got, want = exchange.outputs_of(case, "xla")["y"], exchange.specified(case)["y"]
    assert got.dtype == cases.jax.numpy.dtype(case.config.dtype)
    np.testing.assert_array_equal(got.astype(np.float64), want)


@pytest.mark.parametrize("name", CONFIGS)
def test_capacity_is_the_contract(name: str):
    config = CONFIGS[name]
    assert exchange.make_group(config, "xla").capacity(config.T) == config.C


def test_table_meets_what_it_names():
    """Drops, invalid ids, unused experts and masked tokens really occur in the table."""
    specified = {str(case): exchange.specified(case) for case in CASES}
    assert specified["expert_data_tiny-one_device"]["num_dropped"].sum() > 0
    assert specified["two_devices_f16-duplicates"]["num_dropped"].sum() > 0
    assert specified["eight_devices-invalid"]["num_invalid"].sum() > 0
    assert (specified["plain-empty_experts"]["group_sizes"] == 0).any()
    assert specified["plain-all_masked"]["num_rows"].sum() == 0
    assert specified["plain-one_device"]["num_rows"][0, :-1].sum() == 0
    assert sum(s["num_dropped"].sum() > 0 for s in specified.values()) >= 8


def test_higher_ranked_choices_survive():
    """One expert for all choices, room for half of them: first choices stay, second ones go."""
    config = cases.Config(R=2, T=3, E=2, K=2, D=2, capacity_factor=1.0)
    ids = np.zeros((1, 2, 3, 2), np.int32)
    inputs = exchange.make_inputs(config, ids, cases.make_rng("rank"), cases.integers)
    got = exchange.run(config, "xla", inputs)
    # Six rows for twelve choices on device 0: k = 0 of all six tokens of both devices.
    assert got["num_dropped"].tolist() == [[6, 0]]
    np.testing.assert_array_equal(got["row_map"][0, 0, :, :, 0], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(got["row_map"][0, 0, :, :, 1], -1)
