"""`transport="cpu"` across the processes of a host (`jax.distributed`).

Starting a process takes seconds, so a launch makes many checks; `tests/workers/` holds them.
"""

import signal
from pathlib import Path

import numpy as np
import processes
import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(200)]

LAUNCHES = [
    pytest.param(
        2, 1, ("two_devices-zipf", "two_devices_f16-zipf", "all_experts-uniform"),
        id="2_processes", marks=pytest.mark.smoke,
    ),
    pytest.param(
        2, 2, ("plain-invalid", "large_drops-zipf", "wire_narrow-uniform"),
        id="2_processes_of_2_devices",
    ),
    pytest.param(4, 1, ("large_drops-uniform", "wire_large-zipf"), id="4_processes"),
    # Slices of the mesh across processes and within one, and one that some have no device in.
    pytest.param(
        4, 2,
        (
            "data_expert-masked", "slices_of_two-zipf", "expert_data_tiny-uniform", "tuple-zipf",
            "reversed-one_expert", "large-zipf", "wire-invalid", "wire_powers-masked",
        ),
        id="4_processes_of_2_devices",
    ),
]  # fmt: skip


@pytest.mark.parametrize("num_processes, num_devices, names", LAUNCHES)
def test_exchanges(num_processes: int, num_devices: int, names: tuple[str, ...]):
    logs = processes.run("exchanges", num_processes, num_devices, *names)
    assert all(f"process {rank} is done" in log for rank, log in enumerate(logs))


def test_training_gives_the_numbers_of_one_process(tmp_path: Path):
    """Gradients are summed in another order between processes: a few roundings in float32."""
    results = {}
    for num_processes, num_devices in ((1, 4), (2, 2)):
        path = tmp_path / f"{num_processes}.npz"
        processes.run("train", num_processes, num_devices, str(path))
        results[num_processes] = dict(np.load(path))
    one, two = results[1], results[2]
    assert one.keys() == two.keys() and {"losses", "gate", "router"} <= one.keys()
    assert one["losses"][-1] < one["losses"][0]
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_lost_process_is_named_in_time(how: str):
    with processes.Launch("lost_peer", 2, 2, how) as launch:
        launch.wait(60, ranks=[0])
        launch.kill([1])
        logs = launch.check({1: -signal.SIGKILL})
    assert logs[0].endswith("closed\n")


def test_a_failing_process_fails_the_test():
    """The harness itself: exit codes and logs of all processes are in the error."""
    with pytest.raises(AssertionError, match=r"process 0 ended with 2, log:\n.*open file") as error:
        processes.run("no_such_worker", 2, 1)
    assert "process 1 ended with 2" in str(error.value)
