"""`benchmarks/scaling.py`: what it plans, what it does with parts that fail, what it reports."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402
import scaling_report  # noqa: E402
from scaling_parts import Part, choose, duration, make_steps  # noqa: E402


def parts_of(steps: list[Any]) -> list[Part]:
    return [part for step in steps for lane in step for part in lane]


# Planning


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8, 16])
def test_timings_side_by_side_share_no_gpu(num_devices: int, platform: str, full: bool):
    steps = make_steps(num_devices, platform, full)
    names = [part.name for part in parts_of(steps)]
    assert len(set(names)) == len(names)
    for step in steps:
        assert len({part.is_test for lane in step for part in lane}) == 1
        for a, b in itertools.combinations(step, 2):
            shared = {g for p in a for g in p.gpus} & {g for p in b for g in p.gpus}
            assert not shared or a[0].is_test
    assert all(set(part.gpus) <= set(range(num_devices)) for part in parts_of(steps))


def test_every_number_of_devices_is_timed():
    timed = {len(part.gpus) for part in parts_of(make_steps(8, "gpu")) if not part.is_test}
    assert timed == {1, 2, 4, 8}


def test_half_of_ten_minutes_has_what_matters():
    for num_devices in (4, 8):
        steps = choose(make_steps(num_devices, "gpu"), 240)
        kept = {part.name for part in parts_of(steps)}
        assert sum(map(duration, steps)) <= 240
        assert {f"test-ep{num_devices}", f"ep{num_devices}-large", "ep2", "ep1"} <= kept


@pytest.mark.parametrize("seconds", [0, 1, 30, 100, 240, 10_000])
def test_what_matters_least_goes_first(seconds: float):
    steps = make_steps(4, "gpu")
    kept = {part.name for part in parts_of(choose(steps, seconds))}
    gone = [part for part in parts_of(steps) if part.name not in kept]
    assert sum(map(duration, choose(steps, seconds))) <= seconds
    worst = max((p.importance for p in parts_of(steps) if p.name in kept), default=0)
    assert all(part.importance >= worst for part in gone)
    assert (not gone) == (seconds == 10_000)


# Running


def python(name: str, code: str, seconds: float = 20) -> Part:
    return Part(name, ("-c", code), (0,), seconds, 1)


def test_a_failure_stops_no_other_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runner = scaling.Runner(tmp_path, 60, "cpu")
    runner.tree.mkdir()
    write = "import json, pathlib; pathlib.Path('good.json').write_text(json.dumps({'a': 1}))"
    failing, good = python("failing", "print('why'); exit(3)"), python("good", write)
    runner.run([((failing,), (good,)), ((python("last", "print('end')"),),)])
    assert {o.name: o.status for o in runner.outcomes} == {
        "failing": "failed", "good": "ok", "last": "ok",
    }  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["figures"] == {"good": {"a": 1}}
    assert [part["status"] for part in results["parts"]].count("failed") == 1
    assert "the end of failing.log:\n    why" in capsys.readouterr().out


def test_time_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A part that hangs is killed; what does not fit is left out, what is short still runs."""
    runner = scaling.Runner(tmp_path, scaling.RESERVE_SECONDS + 4, "cpu")
    runner.tree.mkdir()
    hanging = python("hanging", "import time; time.sleep(100)", 2)
    runner.run([((hanging,),), ((python("late", "pass", 50),),)])
    assert {o.name: o.status for o in runner.outcomes} == {"hanging": "timeout", "late": "dropped"}
    assert runner.outcomes[0].seconds < 10
    assert "late: dropped" in scaling_report.finish(tmp_path)
    assert "late: left out" in capsys.readouterr().out


def test_command_on_host_devices(tmp_path: Path):
    """Dispatch and combine on 2 and 1 devices, table and picture."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--platform", "cpu"]
    command += ["--devices", "2", "--parts", "ep1|ep2-small", "--out", str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {part["name"]: part["status"] for part in results["parts"]} == {
        "ep2-small": "ok", "ep1": "ok",
    }  # fmt: skip
    assert "ep1: ok" in done.stdout and "everything ran" in done.stdout
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--devices", "3"], "--devices must be a power of two, got 3"),
        (["--devices", "2", "--parts", "("], "--parts must be a regular expression"),
        (["--devices", "2", "--parts", "nothing"], "no part is left"),
    ],
)
def test_bad_options(options: list[str], sentence: str):
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and sentence in done.stderr


# Reporting


def report_of(devices: int, us: dict[str, float], **options: Any) -> dict[str, Any]:
    """What `jaxmoe bench` writes, one shape."""
    return {
        "num_devices": devices,
        "num_processes": 1,
        "devices": ["a GPU"] * devices,
        "bandwidths": {"link_gbs": 100.0},
        "options": options,
        "shapes": [
            {
                "tokens": 64, "dim": 8, "top_k": 2, "num_experts": 4,
                "wire_dtype": options.get("wire_dtype"),
                "floors": {name: {"us": t / 2} for name, t in us.items()},
                "results": [
                    {
                        "implementation": implementation, "operation": name, "note": "",
                        "status": "ok", "us": t, "events": {"us": t}, "loop": None,
                        "wire_gbs": 1000 / t,
                    }
                    for implementation in ("p2p", "xla")
                    for name, t in us.items()
                ],
            }
        ],
    }  # fmt: skip


def test_curves_and_table(tmp_path: Path):
    reports = {
        "ep4-large": report_of(4, {"dispatch": 40.0, "combine": 50.0}),
        "ep4-sms": report_of(4, {"dispatch": 77.0, "combine": 88.0}, num_sms=24),
        "ep4-fp8": report_of(4, {"dispatch": 33.0}, wire_dtype="float8_e4m3fn"),
        "ep2": report_of(2, {"dispatch": 20.0, "combine": 25.0}),
    }
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    (tmp_path / "cut.json").write_text('{"num_devices": 4, "shap')
    results = scaling_report.collect(tmp_path, [{"name": "cut", "status": "timeout"}])
    rows = scaling_report.exchange_rows(results)
    (operations,) = scaling_report.curves(rows).values()
    assert {
        name: {n: row["us"] for n, row in by_devices.items()}
        for name, by_devices in operations.items()
    } == {"dispatch": {2: 20.0, 4: 40.0}, "combine": {2: 25.0, 4: 50.0}}
    lines = scaling_report.table(results)
    (sms,) = [line.split() for line in lines if " 24 p2p" in line]
    assert sms[:8] == ["4", "64,", "8,", "2,", "4", "rows", "24", "p2p"]
    assert sms[8:] == ["77.0", "(38.5)", "88.0", "(44.0)", "13", "11"]
    (fp8,) = [line for line in lines if " fp8 " in line and " p2p " in line]
    assert "33.0 (16.5)" in fp8
    assert lines[-1] == "cut: timeout"


def test_a_single_number_of_devices_makes_no_picture(tmp_path: Path):
    (tmp_path / "ep4.json").write_text(json.dumps(report_of(4, {"dispatch": 1.0})))
    text = scaling_report.finish(tmp_path)
    assert "no picture: no size was timed on two numbers of devices" in text
    assert (tmp_path / "results.txt").read_text() == text + "\n"
