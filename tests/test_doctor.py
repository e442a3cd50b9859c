"""`python -m jaxmoe doctor`: what it finds on CPUs, and what it says where something is missing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxmoe import transport
from jaxmoe.cli import _machine, _probe, _system, doctor

ROOT = Path(__file__).parents[1]
LAUNCH = "Start programs with `python -m jaxmoe launch`, one process for each GPU, to use"


@pytest.mark.multiprocess
@pytest.mark.smoke
@pytest.mark.timeout(200)
def test_this_machine():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    paths = [os.environ.get("PYTHONPATH"), str(ROOT)]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "NCCL_TEST": "a b",
    }
    result = subprocess.run(
        [sys.executable, "-m", "jaxmoe", "doctor", "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["packages"]["jax"] == jax.__version__
    assert report["xla"]["platform"] == "cpu" and len(report["xla"]["devices"]) == 1
    assert report["environment"]["NCCL_TEST"] == "a b"
    transports = report["transports"]
    assert set(transports) == set(transport.NAMES) - {"auto"}
    for name in ("cpu", "xla"):
        assert transports[name]["works"] and transports[name]["num_devices"] == 4
    for name in set(transports) - {"cpu", "xla"}:
        assert not transports[name]["works"]
        assert transports[name]["reason"].startswith("it serves GPUs and the mesh has cpu devices")


def test_a_wrong_result_is_no_working_transport(monkeypatch: pytest.MonkeyPatch):
    right = _probe._there_and_back

    def wrong(group: Any) -> Any:
        (y, *rest), tokens = right(group)
        return ([-y, *rest] if group.transport == "cpu" else [y, *rest]), tokens

    assert _probe.exchange("cpu")["works"]
    monkeypatch.setattr(_probe, "_there_and_back", wrong)
    answer = _probe.exchange("cpu")
    assert not answer["works"]
    assert answer["reason"] == "it gives other numbers than transport 'xla'"
    assert _probe.exchange("p2p") == {
        "works": False,
        "reason": "it serves GPUs and the mesh has cpu devices",
    }


def test_bandwidth_of_each_pair():
    rates = _probe.measure(jax.devices()[:3], 1 << 16)
    assert [len(row) for row in rates] == [3, 3, 3]
    assert all(rate > 0 for row in rates for rate in row)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import time; time.sleep(60)", "no answer after 0.5 seconds"),
        ("import os; os.kill(os.getpid(), 11)", "its process ended with code -11: "),
        ("raise SystemExit('no driver')", "its process ended with code 1: no driver"),
        ("print('nothing')", "its process ended with code 0: "),
    ],
)
def test_a_probe_that_hangs_or_crashes(program: str, problem: str):
    begin = time.monotonic()
    seconds = 0.5 if "sleep" in program else 30
    assert doctor._ask_jax(["devices"], seconds, ("-c", program)) == {"problem": problem}
    assert time.monotonic() - begin < 20


def test_all_ranks_of_a_launch_must_succeed():
    program = """
for rank, works in enumerate(["true", "false", "true"]):
    print(f'[{rank}] JAXMOE_PROBE {{"works": %s, "rank": {rank}}}' % works)
"""
    answer = doctor._ask_jax(["exchange", "nvshmem"], 30, ("-c", program))
    assert answer == {"works": False, "rank": 1}


GPU = dict(index="0", name="NVIDIA H200", driver_version="580", compute_cap="9.0")


def machine(**changes: Any) -> dict[str, Any]:
    """A report of a machine of two GPUs on which everything works."""
    packages = dict.fromkeys(_machine.PACKAGES + _machine.CUDA_PACKAGES)
    report: dict[str, Any] = {
        "python": "3.11",
        "packages": packages | {"jax": "0.11", "jax-cuda13-plugin": "0.11"},
        "gpus": [GPU, GPU | {"index": "1"}],
        "gpu_problem": "",
        "topology": None,
        "host_library": "_cpu.so",
        "cuda_build": "built",
        "environment": {},
        "xla": {
            "platform": "gpu",
            "devices": [{"id": i, "kind": "NVIDIA H200"} for i in range(2)],
            "libraries": {"cuda": "a.so", "nvshmem": "b.so"},
            "nvshmem_library": "c.so",
            "nvshmem_reason": "",
        },
        "transports": {
            name: {"works": True, "reason": ""} for name in transport.NAMES if name != "auto"
        },
        "bandwidth": [[4000.0, 390.5], [391.5, 4001.0]],
        "advice": [],
    }
    return report | changes


def test_a_machine_with_everything():
    report = machine()
    (sentence,) = doctor.advice(report)
    assert sentence.startswith(LAUNCH)
    table = "\n".join(doctor._table(report))
    assert "  0  NVIDIA H200, 580, 9.0\n  1  NVIDIA H200" in table
    assert "     0  4000.0   390.5\n     1   391.5  4001.0" in table
    assert "  nvshmem  works" in table


NO_CUDA_BUILD = {"cuda": "a.so", "nvshmem": None}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpu_problem": "nvidia-smi does not answer"}, "Repair the NVIDIA driver, or restart"),
        ({"host_library": None}, "Reinstall jaxmoe where a C++ compiler is"),
        ({"packages": dict.fromkeys(_machine.CUDA_PACKAGES)}, "Install jaxmoe[cuda13] (jaxmoe[cu"),
        (
            {"xla": {"platform": "cpu"}, "environment": {"JAX_PLATFORMS": "cpu"}},
            "Unset JAX_PLATFORMS: it may hide",
        ),
        ({"xla": {"platform": "cpu"}}, "Look at what `JAX_PLATFORMS=cuda python -c"),
        ({"xla": {"problem": "no answer"}}, "Make `python -c 'import jax; jax.devices()'` work: n"),
        (
            {"xla": {"platform": "gpu", "libraries": NO_CUDA_BUILD}, "cuda_build": "no nvcc"},
            "Reinstall jaxmoe where nvcc and NVSHMEM are, for its CUDA libraries: no nvcc",
        ),
        ({"xla": {"nvshmem_reason": "not there"}}, "Install NVSHMEM for transport 'nvshmem': not"),
        (
            {"transports": {"p2p": {"works": False, "reason": "no answer after 9 seconds"}}},
            "Do not use transport 'p2p' here, and report what",
        ),
    ],
)
def test_what_is_missing_is_advised(changes: dict[str, Any], sentence: str):
    assert not [line for line in doctor.advice(machine()) if line.startswith(sentence)]
    assert [line for line in doctor.advice(machine(**changes)) if line.startswith(sentence)]


@pytest.mark.parametrize("working", [True, False])
def test_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys, working: bool):
    """One working transport is enough; CUDA that does not start leaves the CPUs to look at."""
    monkeypatch.setenv("JAX_PLATFORMS", "")

    def ask(question: list[str], *_: Any, **__: Any) -> dict[str, Any]:
        if question[0] == "devices" and os.environ["JAX_PLATFORMS"] != "cpu":
            return {"problem": "no driver"}
        if question[0] == "devices":
            return {"platform": "cpu", "devices": [], "why_not": {"cpu": "", "p2p": "no GPUs"}}
        return {"works": working}

    monkeypatch.setattr(doctor, "_ask_jax", ask)
    args = argparse.Namespace(json=False, probe_timeout=1.0)
    assert doctor.run(args) == (0 if working else 1)
    output = capsys.readouterr().out
    assert "  p2p  does not work: no GPUs\n" in output
    assert "jax.devices()'` work: no driver." in output


def test_gpus_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def becomes(text: str) -> None:
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)

    becomes("echo '0, NVIDIA H200, 143771 MiB, 580.1, 9.0'")
    memory = {"memory.total": "143771 MiB", "driver_version": "580.1"}
    assert _machine._gpus() == ([GPU | memory], "")
    becomes("echo 'no communication'; exit 9")
    assert _machine._gpus() == ([], "nvidia-smi failed: no communication")
    becomes("sleep 60")
    monkeypatch.setattr(_system, "SECONDS", 0.3)
    assert _machine._gpus() == ([], "nvidia-smi does not answer")


def test_underlined_words_are_written_plainly():
    answer = _system.ask(["printf", r"\033[4mGPU0\tGPU1\033[0m NV18\n"])
    assert answer is not None
    assert answer.plain == "GPU0\tGPU1 NV18\n"
