"""The decoding loop on GPUs: recorded in command buffers, the caches in place, the right tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import processes
import pytest
from decoding import captured

pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def num_gpus() -> int:
    return processes.require_gpus()


@pytest.mark.parametrize("num", [1, 2], ids=["p2p", "nvshmem"])
def test_the_step_is_recorded_in_command_buffers(tmp_path: Path, num_gpus: int, num: int) -> None:
    """Each of our calls lies in one, and a thousand replays give the tokens of "xla"."""
    if num > num_gpus:
        pytest.skip(f"needs {num} GPUs")
    names, dump = tmp_path / "names", tmp_path / "dump"
    variables = {
        "JAXMOE_TEST_TRANSPORT": "p2p" if num == 1 else "nvshmem",
        "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text "
        "--xla_dump_hlo_module_re=.*_steps.*",
    }
    gpus = [None] if num == 1 else list(range(num))
    with processes.Launch(
        "decode", num, 1, "1024", str(names), gpus=gpus, environment=variables
    ) as started:
        started.wait(processes.LAUNCH_SECONDS)
        logs = started.check()
    assert all("the same: True" in log for log in logs), logs
    assert all("copies of a cache in the loop: []" in log for log in logs), logs
    targets = dict(line.split() for line in names.read_text().splitlines())
    # The first of the three layers is dense. There may be calls for the experts' products, too.
    for operation in ("jaxmoe_dispatch", "jaxmoe_combine"):
        assert sum(target.startswith(operation) for target in targets.values()) == 2, targets
    # The programs of both transports are there; "xla" has the calls for the products alone.
    programs = {
        path.name: captured(path.read_text())
        for path in sorted(dump.glob("*thunk_sequence_after_thunk_passes*"))
    }
    there = ", ".join(sorted(path.name for path in dump.iterdir()))
    assert programs, f"XLA made no command buffer of any program; it dumped: {there}"
    for name, (_, outside) in programs.items():
        assert not outside, f"{name}: not recorded: {outside}"
    counts = {name: len(inside) for name, (inside, _) in programs.items()}
    assert max(counts.values()) == len(targets), (counts, targets)


def tokens_of(kind: str, num_devices: int, **options: Any) -> list[list[int]]:
    (log,) = processes.run("greedy", 1, 8, kind, str(num_devices), **options)
    (line,) = re.findall(r"^tokens: (.*)$", log, re.MULTILINE)
    return json.loads(line)


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_gpus_write_what_the_host_writes(num_gpus: int, kind: str) -> None:
    """The same tokens in float32 on one GPU, on two, and on eight devices of the host."""
    expected = tokens_of(kind, 8)
    assert len({token for row in expected for token in row}) > 5
    for num_devices in range(1, min(num_gpus, 2) + 1):
        assert tokens_of(kind, num_devices, gpus=[None]) == expected, num_devices
