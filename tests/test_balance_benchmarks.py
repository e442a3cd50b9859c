"""The benchmarks of balance run, and what they print adds up; figures are those of tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, folder: Path, *args: str) -> dict[str, Any]:
    """The report of a benchmark in a process of its own."""
    path = folder / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args, "--json", str(path)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_skewed_step(tmp_path: Path):
    options = """
        --devices 4 --rounds 2 --calls 1 --forward --tokens 32 --dim 32 --hidden-dim 8 --experts 16
        --redundant 8 --top-k 2 --zipf 3 --lookup-tokens 8 --lookup-dim 16 --lookup-experts 16
        --lookup-redundant 4 --lookup-top-k 2
    """
    report = run("skewed_step.py", tmp_path, *options.split())
    steps = report["steps"]
    assert {name: sum(row["rows"]) for name, row in steps.items()} == dict.fromkeys(
        ("uniform", "skewed", "moved", "replicas"), 4 * 32 * 2
    )
    assert steps["uniform"]["by_uniform"] == 1
    busiest = [steps[name]["busiest"] for name in ("skewed", "moved", "replicas")]
    assert busiest == sorted(busiest, reverse=True) and busiest[-1] < 1.5 < busiest[0]
    (row,) = report["lookup"]
    assert row["tokens"] == 8 and min(row["given"], row["looked_up"], row["alone"]) > 0


def test_routing_quality(tmp_path: Path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "quality.png"
    report = run(
        "routing_quality.py",
        tmp_path,
        *("--preset", "tiny", "--steps", "2", "--windows", "16", "--plot", str(picture)),
        *("--strategies", "1 node of 4", "capacity 1, drop"),
    )
    rows = report["strategies"]
    assert list(rows) == ["plain", "1 node of 4", "capacity 1, drop"]
    plain, node, bounded = rows.values()
    assert plain["change"] == plain["refused"] == node["refused"] == 0
    assert node["node_copies"] < plain["node_copies"]
    assert bounded["refused"] > 0 == bounded["rerouted"]
    assert bounded["copies_saved"] == pytest.approx(
        1 - bounded["device_copies"] / plain["device_copies"]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
