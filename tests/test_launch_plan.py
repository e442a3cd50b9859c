"""What `python -m jaxmoe launch` would start, and the command line around it."""

from __future__ import annotations

import argparse
import ast
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxmoe
from jaxmoe import cli
from jaxmoe.cli import _system, launch
from jaxmoe.cli._output import _Stream

SCRIPT = str(Path(__file__))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four GPUs with JAX's plugin, and no settings of its own."""
    monkeypatch.setattr(_system, "count_gpus", lambda: 4)
    monkeypatch.setattr(launch, "_CUDA_PLUGINS", ("json",))
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    launch.add_arguments(parser)
    return parser.parse_args([*map(str, words), SCRIPT])


def environments(*words: object) -> list[dict[str, str]]:
    args = parse(*words)
    launch._check(args)
    plan = launch.make_plan(args)
    return [launch._environment(args, plan, i) for i in range(plan.num_ranks)]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("words", "devices", "fraction"),
    [
        ((), "0123", None),
        (("-n", 2), "01", None),
        (("--processes-per-gpu", 2), "00112233", "0.375"),
        (("--processes-per-gpu", 2, "-n", 3), "001", "0.375"),
        (("--devices", "3,1"), "31", None),
        (("--devices", "0,0,0,1", "-n", 4), "0001", "0.250"),
    ],
)
def test_the_gpu_of_each_rank(words: tuple, devices: str, fraction: str | None):
    ranks = environments(*words)
    assert "".join(env["JAX_LOCAL_DEVICE_IDS"] for env in ranks) == devices
    assert [int(env["JAX_PROCESS_ID"]) for env in ranks] == list(range(len(devices)))
    for env in ranks:
        assert env["JAX_NUM_PROCESSES"] == str(len(devices))
        # CUDA that does not start must not become a run on CPUs.
        assert env["JAX_PLATFORMS"] == "cuda,cpu"
        assert env.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == fraction
        # A world of one host listens to that host alone.
        assert env["JAX_COORDINATOR_BIND_ADDRESS"] == env["JAX_COORDINATOR_ADDRESS"]
        assert env["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")


@pytest.mark.usefixtures("gpus")
def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".1")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    (first, *_) = environments("--processes-per-gpu", 2)
    assert first["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".1"
    assert first["JAX_PLATFORMS"] == "cuda"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=9 --xla_b=2")
    ranks = environments("-n", 2, "--devices-per-process", 4)
    flags = "--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=4"
    assert [env["XLA_FLAGS"] for env in ranks] == [flags, flags]
    assert all("JAX_LOCAL_DEVICE_IDS" not in env for env in ranks)


@pytest.mark.usefixtures("gpus")
def test_ranks_of_the_second_node():
    ranks = environments("--nodes", 2, "--node-rank", 1, "--coordinator", "host0:99")
    assert [env["JAX_PROCESS_ID"] for env in ranks] == ["4", "5", "6", "7"]
    assert [env["JAX_LOCAL_DEVICE_IDS"] for env in ranks] == ["0", "1", "2", "3"]
    for env in ranks:
        assert (env["JAX_COORDINATOR_ADDRESS"], env["JAX_NUM_PROCESSES"]) == ("host0:99", "8")
        assert "JAX_COORDINATOR_BIND_ADDRESS" not in env


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("-n", 5), "-n 5, but 4 is the most for 4 GPUs and --processes-per-gpu 1. Use -n 4; for"),
        (("-n", 9), "--processes-per-gpu 3 lets ranks share."),
        (("-n", 0), "-n must be positive, got 0."),
        (("--devices", "0,4"), "--devices: no GPU 4; there are 0 to 3."),
        (("--devices", "0;1"), "--devices must be numbers with commas, as 0,0,1,1, got '0;1'."),
        (("--devices", "0,1", "-n", 3), "-n 3, but --devices names 2. Leave one of them out."),
        (("--devices-per-process", 2), "--devices-per-process is of CPUs; a rank has one GPU."),
        (("--platform", "cpu"), "no GPU to count: say with -n how many ranks to start"),
        (("--platform", "cpu", "-n", 2, "--devices", "0,0"), "and these ranks run on CPUs."),
        (("--nodes", 2), "several --nodes need --node-rank I and --coordinator HOST:PORT"),
        (("--node-rank", 1), "--node-rank must be from 0 to 0, got 1."),
        (("--coordinator", "host"), "--coordinator must be HOST:PORT, got 'host'."),
        (("--timeout", -1), "--timeout must be positive, got -1.0."),
        (("-m",), "no module named"),
    ],
)
def test_what_cannot_work_is_said(words: tuple, sentence: str, capfd: pytest.CaptureFixture):
    assert launch.run(parse(*words)) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("launch: ") and sentence in errors


def test_a_missing_script_is_said(capfd: pytest.CaptureFixture):
    assert cli.main(["launch", "-n", "1", "no/such script.py", "-h"]) == 2
    assert "launch: no script 'no/such script.py' in " in capfd.readouterr().err


def test_a_taken_port_is_said(capfd: pytest.CaptureFixture):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("--platform", "cpu", "-n", 1, "--coordinator", f"localhost:{port}")
        assert launch.run(parse(*words)) == 2
    assert f"port {port} cannot be had here (Address already in use)" in capfd.readouterr().err


@pytest.mark.usefixtures("gpus")
def test_gpus_without_a_plugin(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setattr(launch, "_CUDA_PLUGINS", ("no_such_plugin",))
    assert launch.run(parse("--platform", "gpu")) == 2
    assert "install jaxmoe[cuda13].\n" in capfd.readouterr().err
    assert [env["JAX_PLATFORMS"] for env in environments("-n", 1)] == ["cpu"]
    assert "Going on with CPUs." in capfd.readouterr().err


LIST = "GPU 0: NVIDIA A (UUID: GPU-1)\n  MIG 1g.1gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA A\n"


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("1", 1), ("0,1,2", 2), ("", 0), ("1,-1,0", 1)]
)
def test_gpus_are_counted(monkeypatch, tmp_path: Path, visible: str | None, count: int):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{LIST}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert _system.count_gpus(environment) == count


def test_gpus_are_counted_by_the_driver_where_the_program_fails(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("a", "b", "c"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr(_system, "_DRIVER_FOLDER", tmp_path / "gpus")
    assert _system.count_gpus({}) == 3
    monkeypatch.setattr(_system, "_DRIVER_FOLDER", tmp_path / "none")
    assert _system.count_gpus({}) == 0


def test_a_program_that_hangs_is_given_up():
    begin = time.monotonic()
    answer = _system.ask(["sh", "-c", "trap '' TERM; sleep 60"], seconds=0.3)
    assert answer is not None and answer.code is None
    assert time.monotonic() - begin < 10
    assert _system.ask(["no-such-program"]) is None


def test_lines_are_cut_however_they_come():
    text = b"one\r\n\r\n\rbar 1\rbar 2\r\ntwo\nthree"
    want = [b"one", b"", b"bar 1", b"bar 2", b"two", b"three"]
    for size in range(1, len(text) + 1):
        stream, lines = _Stream(0, sys.stdout.buffer), []
        for start in range(0, len(text), size):
            lines += stream.lines(text[start : start + size])
        assert lines + stream.lines(b"") == want, size


def test_help_needs_no_jax():
    program = (
        "import sys; from jaxmoe import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    for words in ([], *([name] for name in cli.COMMANDS)):
        command = [sys.executable, "-c", program, *words, "--help"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"usage: python -m jaxmoe {''.join(words)}")
        if not words:
            assert all(re.search(rf"^ +{name} ", result.stdout, re.M) for name in cli.COMMANDS)


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["--launch"]])
def test_a_command_is_needed(words: list[str], capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "usage: python -m jaxmoe" in capfd.readouterr().err


def test_names_of_the_package_are_those_that_type_checkers_see():
    tree = ast.parse(Path(str(jaxmoe.__file__)).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {a.name: node.module for node in imports for a in node.names if a.asname == a.name}
    assert seen == jaxmoe._HOME | dict.fromkeys(jaxmoe._MODULES, "jaxmoe")
    for name in seen:
        assert getattr(jaxmoe, name) is not None
        assert name in dir(jaxmoe)
    with pytest.raises(AttributeError, match="'no_such_name'"):
        _ = jaxmoe.no_such_name
