"""What the benchmark of a layer found: as a table and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable
from typing import Any

import jax

from jaxmoe.bench import machine, phases, report
from jaxmoe.bench.clocks import Timing
from jaxmoe.bench.layer import LayerReport, LayerResult, phase_names

# TFLOP/s of dense products with 16-bit inputs: NVIDIA's data sheets of the SXM boards.
_DATA_SHEETS = {"H200": 989.5, "H100 80GB HBM3": 989.5}
# Multiples of rows * D * F: three products, and two more of each for the gradients.
_OPERATIONS = {"forward": 6, "both": 18}
_HEADER = (
    f"{'layer':<18} {'forward ms':>11} {'±':>6} {'TFLOP/s':>8} {'of dense':>8}  "
    f"{'fwd+bwd ms':>11} {'±':>6} {'TFLOP/s':>8} {'of dense':>8}"
)


def heading(num_devices: int) -> list[str]:
    """What all tables of a run have in common."""
    return [
        machine.describe(num_devices),
        "ms: wall clock of calls from Python, the next being made while one runs; of the slowest "
        "process.",
        "TFLOP/s: the experts' products on the device with most rows, over the time of the layer.",
    ]


def table(found: LayerReport) -> list[str]:
    """The lines of one shape."""
    shape, traffic = found.shape, found.traffic
    factor = "none" if found.capacity_factor is None else f"{found.capacity_factor:g}"
    lines = [
        "",
        f"T={shape.tokens} D={shape.dim} F={shape.hidden_dim} K={shape.top_k} "
        f"E={shape.num_experts}, {found.dtype}, routing {found.load}, capacity factor {factor} "
        f"({traffic.capacity} rows a device, at most {found.rows} in use, "
        f"{traffic.num_dropped} choices dropped)",
        "dense products, TFLOP/s: "
        + ", ".join(
            f"[{m}, {k}] x [{k}, {n}] {tflops:.4g}" for (m, k, n), tflops in _dense(found).items()
        )
        + f"; the best is the measure{_of_data_sheet(found)}",
        _HEADER,
        *(_row(found, result) for result in found.results),
    ]
    for result in found.results:
        if result.phases:
            lines += ["", *_breakdown(found, result)]
    return [*lines, "", *conclusions(found)]


def _row(found: LayerReport, result: LayerResult) -> str:
    if result.both is None and result.forward is None:
        return f"{result.name:<18} {result.status}: {result.note}"
    cells = [
        _cells(found, timing, operations)
        for timing, operations in (
            (result.forward, _OPERATIONS["forward"]),
            (result.both, _OPERATIONS["both"]),
        )
    ]
    return f"{result.name:<18} {'  '.join(cells)}  {result.note}".rstrip()


def _cells(found: LayerReport, timing: Timing | None, operations: int) -> str:
    if timing is None:
        return f"{'-':>11} {'':>6} {'-':>8} {'-':>8}"
    tflops = rate(found, timing.us, operations)
    share = tflops / dense_rate(found)
    ms, spread = timing.us / 1e3, timing.spread_us / 1e3
    return f"{ms:>11.3f} {spread:>6.3f} {tflops:>8.4g} {share:>8.1%}"


def rate(found: LayerReport, us: float, operations: int) -> float:
    """TFLOP/s of `operations` x rows x D x F."""
    return operations * found.rows * found.shape.dim * found.shape.hidden_dim / us / 1e6


def _dense(found: LayerReport) -> dict[tuple[int, int, int], float]:
    return {mkn: 2 * math.prod(mkn) / timing.us / 1e6 for mkn, timing in found.dense.items()}


def dense_rate(found: LayerReport) -> float:
    """TFLOP/s of the best dense product, all devices computing at once."""
    return max(_dense(found).values())


def data_sheet(found: LayerReport) -> float | None:
    """TFLOP/s that the maker gives for the device and dtype, where known."""
    names = machine.device_names()
    if found.dtype not in ("bfloat16", "float16"):
        return None
    return next((tflops for name, tflops in _DATA_SHEETS.items() if name in names[0]), None)


def _of_data_sheet(found: LayerReport) -> str:
    peak = data_sheet(found)
    return f", {dense_rate(found) / peak:.1%} of the data sheet's {peak:g}" if peak else ""


def _breakdown(found: LayerReport, result: LayerResult) -> list[str]:
    lines = [f"{result.name}, part by part: {result.phase_note}"]
    for name in phase_names([result]):
        timing, operations = result.phases[name], phases.OPERATIONS.get(name)
        line = f"  {name:<14} {timing.us:>10.1f} us ± {timing.spread_us:>6.1f}"
        if timing.least_us is not None:
            line += f" (fastest device {timing.least_us:>8.1f})"
        if operations:
            tflops = rate(found, timing.us, operations)
            line += f" {tflops:>8.4g} TFLOP/s {tflops / dense_rate(found):>7.1%} of dense"
        lines.append(line)
    for title, names, layer in (
        ("forward", phases.FORWARD, result.forward),
        ("all", (*phases.FORWARD, *phases.BACKWARD), result.both),
    ):
        total = sum(result.phases[name].us for name in names)
        takes = f", the layer takes {layer.us:.1f}" if layer else ""
        lines.append(f"  {title:<14} {total:>10.1f} us together{takes}")
    return lines


def conclusions(found: LayerReport) -> list[str]:
    """The two ratios: against what plain JAX and libraries do, and against a dense product."""
    lines = []
    own = next((r for r in found.results if r.name == found.own), None)
    for title, field in (("forward", "forward"), ("forward + backward", "both")):
        speedup, name = against_plain(found, field)
        if speedup is not None:
            lines.append(
                f"{title}: {found.own} is {speedup:.2f} x as fast as {name}, the best without this "
                "library's custom calls"
            )
    shares = expert_shares(own) if own else {}
    for title, names in shares.items():
        lines.append(f"experts, {title}: {_share(found, own, names):.1%} of the best dense product")
    return lines


def against_plain(found: LayerReport, field: str) -> tuple[float | None, str]:
    """How many times as fast the own layer is as the best plain one, and that one's name."""
    own = [getattr(r, field) for r in found.results if r.name == found.own]
    plain = {
        r.name: getattr(r, field).us
        for r in found.results
        if r.is_plain and r.name != found.own and getattr(r, field) is not None
    }
    if not plain or not own or own[0] is None:
        return None, ""
    best = min(plain, key=lambda name: plain[name])
    return plain[best] / own[0].us, best


def expert_shares(result: LayerResult) -> dict[str, tuple[str, ...]]:
    """The experts' phases, forward and in all, where the result has been taken apart."""
    if not result.phases:
        return {}
    forward = ("gate-up", "down")
    backward = ("down dx", "down dw", "SwiGLU grad", "gate-up dx", "gate-up dw")
    return {"forward": forward, "forward + backward": (*forward, *backward)}


def _share(found: LayerReport, result: Any, names: tuple[str, ...]) -> float:
    us = sum(result.phases[name].us for name in names)
    operations = sum(phases.OPERATIONS.get(name, 0) for name in names)
    return rate(found, us, operations) / dense_rate(found)


def as_json(
    reports: Iterable[LayerReport], options: dict[str, Any], num_devices: int
) -> dict[str, Any]:
    """Every figure of a run and what it takes to repeat it."""
    return {
        "command": report._command(),
        "options": options,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "platform": jax.default_backend(),
        "devices": machine.device_names()[:num_devices],
        "num_devices": num_devices,
        "num_processes": jax.process_count(),
        "host": machine.host(),
        "shapes": [_shape(found) for found in reports],
    }


def _shape(found: LayerReport) -> dict[str, Any]:
    own = next((r for r in found.results if r.name == found.own), None)
    return {
        **dataclasses.asdict(found.shape),
        "dtype": found.dtype,
        "routing": found.load,
        "capacity_factor": found.capacity_factor,
        "capacity": found.traffic.capacity,
        "num_rows": found.traffic.num_rows.tolist(),
        "num_dropped": found.traffic.num_dropped,
        "dense": [
            {"sizes": mkn, "us": found.dense[mkn].us, "tflops": tflops}
            for mkn, tflops in _dense(found).items()
        ],
        "data_sheet_tflops": data_sheet(found),
        "own": found.own,
        "results": [
            {**dataclasses.asdict(result), "name": result.name, **_rates(found, result)}
            for result in found.results
        ],
        "against_plain": {
            field: dict(zip(("speedup", "baseline"), against_plain(found, field), strict=True))
            for field in _OPERATIONS
        },
        "experts_of_dense": {
            title: _share(found, own, names)
            for title, names in (expert_shares(own) if own else {}).items()
        },
    }


def _rates(found: LayerReport, result: LayerResult) -> dict[str, Any]:
    times = {"forward": result.forward, "both": result.both}
    return {
        f"{name}_tflops": rate(found, timing.us, _OPERATIONS[name])
        for name, timing in times.items()
        if timing is not None
    }
