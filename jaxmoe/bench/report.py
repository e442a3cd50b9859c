"""What a run of the benchmark found: as a table, as JSON, as bars."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxmoe.bench import machine
from jaxmoe.bench.clocks import Timing
from jaxmoe.bench.exchange import Result, ShapeReport
from jaxmoe.bench.floors import Machine

_HEADER = (
    f"{'implementation':<15} {'operation':<14} {'loop us':>10} {'±':>7} {'events us':>10} {'±':>7} "
    f"{'wire GB/s':>10} {'logical':>8} {'of floor':>9}"
)


def heading(limits: Machine, num_devices: int) -> list[str]:
    """What all tables of a run have in common."""
    return [
        machine.describe(num_devices),
        f"link {limits.link_gbs:.4g} GB/s each way ({limits.link_source}), memory "
        f"{limits.hbm_gbs:.4g} GB/s ({limits.hbm_source})",
        "loop: wall clock of a loop of calls less that of an empty loop. events: CUDA events.",
        "wire GB/s: bytes over the busiest direction of a link; logical: with rows that stay.",
    ]


def table(report: ShapeReport) -> list[str]:
    """The lines of one shape's table."""
    shape, traffic = report.shape, report.traffic
    factor = "none" if report.capacity_factor is None else f"{report.capacity_factor:g}"
    lines = [
        "",
        f"T={shape.tokens} D={shape.dim} K={shape.top_k} E={shape.num_experts}, routing "
        f"{report.load}, capacity factor {factor} ({traffic.capacity} rows a device, at most "
        f"{traffic.num_rows.max()} in use, {traffic.num_dropped} choices dropped)"
        + (f", {report.wire_dtype} on the wire" if report.wire_dtype else ""),
        "floor us (wire, memory): "
        + ", ".join(
            f"{name} {f.us:.1f} ({f.wire_us:.1f}, {f.hbm_us:.1f})"
            for name, f in report.floors.items()
        ),
    ]
    if report.event_note:
        lines.append(f"no events: {report.event_note}")
    return [*lines, _HEADER, *(_row(report, result) for result in _together(report.results))]


def _together(results: list[Result]) -> Iterator[Result]:
    """The results, but one alone for an implementation that could do nothing."""
    for name, group in itertools.groupby(results, key=lambda r: r.implementation):
        same = list(group)
        if all(r.us is None and r.note == same[0].note for r in same):
            yield Result(name, "all", same[0].status, same[0].note)
        else:
            yield from same


def _row(report: ShapeReport, result: Result) -> str:
    start = f"{result.implementation:<15} {result.operation:<14} "
    if result.us is None:
        return f"{start}{result.status}: {result.note}"
    figures = rates(report, result)
    return (
        f"{start}{_timing(result.loop)} {_timing(result.events)} "
        f"{_number(figures['wire_gbs'], 10, 1)} {_number(figures['logical_gbs'], 8, 1)} "
        f"{_number(figures['of_floor'], 9, 2)}  {result.note}"
    ).rstrip()


def _timing(timing: Timing | None) -> str:
    if timing is None:
        return f"{'-':>10} {'':>7}"
    return f"{timing.us:>10.1f} {timing.spread_us:>7.1f}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def rates(report: ShapeReport, result: Result) -> dict[str, float | None]:
    """GB/s and the fraction of the floor, from the device's clock where there is one."""
    floor, us = report.floors[result.operation], result.us
    if us is None or us <= 0:
        return dict.fromkeys(("wire_gbs", "logical_gbs", "of_floor"))
    return {
        "wire_gbs": floor.wire_bytes / us / 1e3,
        "logical_gbs": floor.logical_bytes / us / 1e3,
        "of_floor": floor.us / us,
    }


def as_json(
    reports: Iterable[ShapeReport], limits: Machine, options: dict[str, Any], num_devices: int
) -> dict[str, Any]:
    """Every figure of a run and what it takes to repeat it."""
    return {
        "command": _command(),
        "options": options,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "platform": jax.default_backend(),
        "devices": machine.device_names()[:num_devices],
        "num_devices": num_devices,
        "num_processes": jax.process_count(),
        "host": machine.host(),
        "bandwidths": _plain(limits),
        "shapes": [_shape(report) for report in reports],
    }


def _command() -> str:
    processes = jax.process_count()
    launch = f"launch -n {processes} -m jaxmoe " if processes > 1 else ""
    return f"python -m jaxmoe {launch}{shlex.join(sys.argv[1:])}"


def _shape(report: ShapeReport) -> dict[str, Any]:
    return {
        **_plain(report.shape),
        "routing": report.load,
        "wire_dtype": report.wire_dtype,
        "capacity_factor": report.capacity_factor,
        "capacity": report.traffic.capacity,
        "num_rows": report.traffic.num_rows.tolist(),
        "num_dropped": report.traffic.num_dropped,
        "sent_rows": report.traffic.sent.tolist(),
        "floors": {name: _plain(floor) for name, floor in report.floors.items()},
        "no_events": report.event_note,
        "results": [
            {**_plain(result), "us": result.us, **rates(report, result)}
            for result in report.results
        ],
    }


def _plain(record: Any) -> dict[str, Any]:
    """A dataclass as JSON can hold it: an infinite bandwidth is null."""
    fields = dataclasses.asdict(record)
    return {
        name: None if isinstance(value, float) and math.isinf(value) else value
        for name, value in fields.items()
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run that is killed leaves what was there before."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def plot(path: Path, reports: list[ShapeReport]) -> None:
    """Bars of time for each shape, operation and implementation, the floor as a line above each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(reports), 1, figsize=(10, 3.5 * len(reports)), squeeze=False, layout="constrained"
    )
    for ax, report in zip(axes[:, 0], reports, strict=True):
        _bars(ax, report)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(ax: Any, report: ShapeReport) -> None:
    names = list(dict.fromkeys(r.implementation for r in report.results if r.us is not None))
    width = 0.8 / max(len(names), 1)
    places = {operation: i for i, operation in enumerate(report.floors)}
    for i, name in enumerate(names):
        timed = [r for r in report.results if r.implementation == name and r.us is not None]
        xs = [places[r.operation] + (i - (len(names) - 1) / 2) * width for r in timed]
        ax.bar(xs, [r.us for r in timed], width, label=name)
    for operation, place in places.items():
        ax.hlines(report.floors[operation].us, place - 0.45, place + 0.45, color="black")
    ax.hlines([], 0, 0, color="black", label="floor")
    shape = report.shape
    ax.set_title(
        f"T={shape.tokens} D={shape.dim} K={shape.top_k} E={shape.num_experts}, {report.load}"
    )
    ax.set_xticks(list(places.values()), list(places))
    ax.set_yscale("log")  # the slowest baseline takes hundreds of times the fastest
    ax.set_ylabel("µs")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
