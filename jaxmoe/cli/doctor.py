"""Show what this machine has and which transports work on it.

Every transport opens a small group and its dispatch and combine are compared with the reference,
in a process of its own with a time limit: a driver that hangs is found, and hangs nothing.

The exit code is 0 if at least one transport works, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmoe.cli import _machine, _system
from jaxmoe.cli._probe import answers_in

_HOST_DEVICES = "--xla_force_host_platform_device_count="
_NUM_HOST_DEVICES = 4
_NUM_ERROR_LINES = 3
_LAUNCH_SECONDS = 10.0  # of the launcher, beyond its own time limit

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--probe-timeout", type=float, default=120.0, metavar="S",
        help="seconds for each question to JAX (default: 120)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Look and print; returns the exit code."""
    report = examine(args.probe_timeout)
    print(json.dumps(report, indent=2) if args.json else "\n".join(_table(report)))
    return 0 if any(t["works"] for t in report["transports"].values()) else 1


def examine(seconds: float) -> Report:
    """Everything there is to say about this machine."""
    report = _machine.facts()
    xla = _ask_jax(["devices"], seconds)
    if "problem" in xla and os.environ.get("JAX_PLATFORMS") != "cpu":
        # CUDA that does not start is no reason to say nothing about CPUs.
        os.environ["JAX_PLATFORMS"] = "cpu"
        xla = _ask_jax(["devices"], seconds) | xla
    why_not = xla.pop("why_not", {})
    report["xla"] = xla
    num_gpus = len(xla.get("devices", ())) if xla.get("platform") == "gpu" else 0
    report["transports"] = {
        name: _try_transport(name, reason, num_gpus, seconds) for name, reason in why_not.items()
    }
    report["bandwidth"] = None
    if num_gpus:
        report["bandwidth"] = _ask_jax(["bandwidth"], seconds).get("gb_per_s")
    report["advice"] = advice(report)
    return report


def _try_transport(name: str, reason: str, num_gpus: int, seconds: float) -> Report:
    """Whether a transport works here: `works`, `reason` and what was tried."""
    if name == "nvshmem" and num_gpus:
        launcher = ["launch", "-n", str(num_gpus), "--timeout", str(seconds), "--grace", "1", "-m"]
        return _exchange(name, seconds + _LAUNCH_SECONDS, ["-m", "jaxmoe", *launcher])
    # It serves CPUs also where the other devices are GPUs.
    if reason and name != "cpu":
        return {"works": False, "reason": reason}
    return _exchange(name, seconds)


def _exchange(name: str, seconds: float, launcher: Sequence[str] = ("-m",)) -> Report:
    flags = os.environ.get("XLA_FLAGS", "")
    if _HOST_DEVICES not in flags:
        flags = f"{flags} {_HOST_DEVICES}{_NUM_HOST_DEVICES}".strip()
    variables = {"XLA_FLAGS": flags} | ({"JAX_PLATFORMS": "cpu"} if name == "cpu" else {})
    answer = _ask_jax(["exchange", name], seconds, launcher, variables)
    problem = answer.pop("problem", "")
    return {"works": False, "reason": problem} | answer


def _ask_jax(
    question: Sequence[str],
    seconds: float,
    launcher: Sequence[str] = ("-m",),
    variables: dict[str, str] | None = None,
) -> Report:
    """The answer of `jaxmoe.cli._probe`, or the `problem` that kept it from answering."""
    # The GPUs' memory is for whoever works on this machine.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (variables or {})
    command = [sys.executable, *launcher, "jaxmoe.cli._probe", *question]
    answer = _system.ask(command, seconds, environment)
    assert answer is not None  # Python itself is there
    if answer.code is None:
        return {"problem": f"no answer after {seconds:g} seconds"}
    found = answers_in(answer.output)
    if answer.code == 0 and found:
        # One of each rank of a launch: it works where it works on all.
        return min(found, key=lambda each: bool(each.get("works", True)))
    lines = [line.strip() for line in answer.errors.splitlines()]
    last = [line for line in lines if line and not line.startswith("launch: ")]
    what = " / ".join(last[-_NUM_ERROR_LINES:])
    return {"problem": f"its process ended with code {answer.code}: {what}"}


def advice(report: Report) -> list[str]:
    """One sentence for each thing that is missing."""
    return list(_advice(report))


def _advice(report: Report) -> Iterator[str]:
    packages, gpus, xla = report["packages"], report["gpus"], report["xla"]
    if report["gpu_problem"]:
        yield f"Repair the NVIDIA driver, or restart the machine: {report['gpu_problem']}."
    if report["host_library"] is None:
        yield "Reinstall jaxmoe where a C++ compiler is: its library for CPUs is missing."
    if xla.get("problem"):
        yield f"Make `python -c 'import jax; jax.devices()'` work: {xla['problem']}."
    if gpus or xla.get("platform") == "gpu":
        yield from _gpu_advice(report, packages, xla)
    for name, transport in report["transports"].items():
        if not transport["works"] and transport["reason"].startswith(("its process", "no answer")):
            yield (
                f"Do not use transport '{name}' here, and report what `python -m jaxmoe doctor "
                "--json` prints."
            )


def _gpu_advice(report: Report, packages: Report, xla: Report) -> Iterator[str]:
    environment = report["environment"]
    if not any(packages[f"jax-cuda{cuda}-plugin"] for cuda in (13, 12)):
        yield "Install jaxmoe[cuda13] (jaxmoe[cuda12] for an older driver): JAX lacks CUDA."
    elif xla.get("platform") != "gpu":
        hiding = [n for n in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES") if n in environment]
        yield (
            f"Unset {' and '.join(hiding)}: it may hide the GPUs from JAX."
            if hiding
            else "Look at what `JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()'` says: "
            "JAX does not use the GPUs."
        )
    libraries = xla.get("libraries", {})
    if not all(libraries.get(name) for name in ("cuda", "nvshmem")):
        built = report["cuda_build"] or "it was not tried"
        yield f"Reinstall jaxmoe where nvcc and NVSHMEM are, for its CUDA libraries: {built}"
    if xla.get("nvshmem_reason"):
        yield f"Install NVSHMEM for transport 'nvshmem': {xla['nvshmem_reason']}."
    if report["transports"].get("nvshmem", {}).get("works"):
        yield (
            "Start programs with `python -m jaxmoe launch`, one process for each GPU, to use "
            "transport 'nvshmem'."
        )


def _table(report: Report) -> Iterator[str]:
    """The report for a reader."""
    yield f"Python {report['python']}"
    yield from _section("Packages", [(n, v) for n, v in report["packages"].items() if v])
    gpus = [
        (gpu.get("index", "?"), ", ".join(str(v) for k, v in gpu.items() if k != "index"))
        for gpu in report["gpus"]
    ]
    yield from _section("GPUs", gpus or [("none", report["gpu_problem"])])
    xla = report["xla"]
    shown = [(str(d["id"]), d["kind"]) for d in xla.get("devices", ())]
    yield from _section(f"JAX devices ({xla.get('platform', 'none')})", shown or [("none", "")])
    yield from _section("Native libraries", _libraries(report))
    if report["topology"]:
        yield from ("", "Links", report["topology"].rstrip())
    if report["bandwidth"]:
        yield from _bandwidth(report["bandwidth"])
    transports = [
        (name, "works" if t["works"] else f"does not work: {t['reason']}")
        for name, t in report["transports"].items()
    ]
    yield from _section("Transports", transports or [("none", xla.get("problem", ""))])
    yield from _section("Environment", list(report["environment"].items()))
    yield from _section("Advice", [("-", sentence) for sentence in report["advice"]])


def _libraries(report: Report) -> list[tuple[str, str]]:
    xla = report["xla"]
    built = xla.get("libraries", {})
    why = report["cuda_build"] or "not built"
    return [
        ("host", report["host_library"] or "missing"),
        ("cuda", built.get("cuda") or why),
        ("nvshmem", built.get("nvshmem") or why),
        ("NVSHMEM", xla.get("nvshmem_library") or xla.get("nvshmem_reason") or "not looked for"),
    ]


def _section(title: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    yield from ("", title)
    for name, value in rows:
        yield f"  {name:<{width}}  {value}".rstrip()


def _bandwidth(rates: list[list[float]]) -> Iterator[str]:
    yield from (
        "",
        "Bandwidth in GB/s, from (row) to (column); within a GPU bytes read and written",
    )
    yield "      " + "".join(f"{column:>8}" for column in range(len(rates)))
    for row, values in enumerate(rates):
        yield f"  {row:>4}" + "".join(f"{value:>8.1f}" for value in values)
