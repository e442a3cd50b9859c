"""What `scaling.py` found, from the files of its parts: one file, a table, a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BASELINES = ("xla", "allgather", "ragged", "ragged-nccl")
_OPERATIONS = ("dispatch", "combine", "dispatch_grad", "combine_grad", "pair")
_CURVES = ("dispatch", "combine")
_DPI = 120
_PROGRESS = re.compile(r"^[WEI]\d{4} |\(\d+/\d+\)$| \.\.\.$")


def collect(out: Path, parts: Sequence[Row]) -> Row:
    """results.json: every part's outcome and figures, beside those of earlier runs."""
    path = out / "results.json"
    earlier = {part["name"]: part for part in _read(path).get("parts", [])}
    results = {
        "parts": list((earlier | {part["name"]: part for part in parts}).values()),
        "figures": {
            file.stem: found
            for file in sorted(out.glob("*.json"))
            if file != path and (found := _read(file))
        },
    }
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)
    return results


def finish(out: Path) -> str:
    """Writes results.json, results.txt and, with matplotlib, scaling.png; returns the table."""
    results = collect(out, [])
    text = "\n".join([*table(results), *_logged(out, results)])
    rows = exchange_rows(results)
    try:
        draw(rows, out / "scaling.png")
    except (ModuleNotFoundError, ValueError) as error:
        text += f"\nno picture: {error}"
    (out / "results.txt").write_text(text + "\n")
    return text


def exchange_rows(results: Row) -> list[Row]:
    """One row for each operation that the parts have timed, with what it was timed on."""
    rows = []
    for part, found in results["figures"].items():
        for shape in found.get("shapes", []):
            if "floors" not in shape:  # not of an exchange
                continue
            common = {
                "part": part,
                "devices": found["num_devices"],
                "processes": found["num_processes"],
                "kind": found["devices"][0],
                "link_gbs": found["bandwidths"]["link_gbs"],
                "num_sms": found["options"].get("num_sms"),
                "shape": tuple(shape[k] for k in ("tokens", "dim", "top_k", "num_experts")),
                "wire": "fp8" if shape.get("wire_dtype") else "",
            }
            for result in shape["results"]:
                floor = shape["floors"][result["operation"]]
                rows.append(common | result | {"floor_us": floor["us"]})
    return rows


def table(results: Row) -> list[str]:
    """The figures as text: of the exchange, one line for each size and implementation."""
    rows = exchange_rows(results)
    lines = []
    if rows:
        kinds = sorted({row["kind"] for row in rows})
        lines = [f"{', '.join(kinds)}; us of a call (its floor), on the slowest device"]
        lines += ["L: the wall clock of a loop, launches included. wire: FP8, or as the rows.", ""]
        head = f"{'EP':>3} {'T, D, K, E':<20} {'wire':<4} {'SMs':>4} {'by':<12}"
        lines.append(head + "".join(f"{name:>22}" for name in _OPERATIONS) + f"{'wire GB/s':>14}")
        lines += [line for key in _keys(rows) for line in _lines(rows, key)]
    lines += _decode_lines(results)
    bad = [p for p in results["parts"] if p["status"] != "ok"]
    return lines + [f"{part['name']}: {part['status']}" for part in bad]


def _keys(rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    """What the figures of a line have in common, in the order of the lines."""
    return sorted({_key(row) for row in rows})


def _key(row: Row) -> tuple[Any, ...]:
    """Many devices, wide models and many tokens first; the library's own before baselines."""
    tokens, *model = row["shape"]
    name = row["implementation"]
    return (
        -row["devices"], tuple(-n for n in model), row["wire"], -tokens, row["num_sms"] or 0,
        (name in BASELINES, name),
    )  # fmt: skip


def _lines(rows: list[Row], key: tuple[Any, ...]) -> list[str]:
    mine = [row for row in rows if _key(row) == key]
    devices, model, wire, tokens, sms, (_, name) = key
    cells = [_cells(mine, operation) for operation in _OPERATIONS]
    rates = [_own(mine, operation) for operation in _CURVES]
    if not any(cells):
        notes = {row["note"] for row in mine if row["note"]}
        return [f"EP{-devices} T={-tokens} {name}: {' '.join(sorted(notes))[:160]}"]
    sizes = ", ".join(str(n) for n in (-tokens, *(-n for n in model)))
    line = f"{-devices:>3} {sizes:<20} {wire or 'rows':<4} {sms or 'all':>4} {name:<12}"
    line += "".join(f"{cell:>22}" for cell in cells)
    return [line + "".join(f"{r['wire_gbs'] or 0:7.0f}" if r else f"{'':7}" for r in rates)]


def _own(rows: list[Row], operation: str) -> Row | None:
    found = [row for row in rows if row["operation"] == operation and row["us"] is not None]
    return found[-1] if found else None


def _cells(rows: list[Row], operation: str) -> str:
    """The device's clock, its floor, and that of a loop."""
    row = _own(rows, operation)
    if row is None:
        return ""
    events, loop = (row[clock] and row[clock]["us"] for clock in ("events", "loop"))
    parts = [f"{events:.1f}"] if events is not None else []
    parts += [f"L{loop:.1f}"] if loop is not None else []
    return f"{' '.join(parts)} ({row['floor_us']:.1f})"


def _logged(out: Path, results: Row) -> list[str]:
    """What the benchmarks of the layer have printed, without their progress."""
    parts = [part["name"] for part in results["parts"] if part["status"] == "ok"]
    logs = [out / f"{name}.log" for name in parts if name.endswith(("-layer", "-skewed"))]
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line.rstrip() for line in lines if not _PROGRESS.search(line)]


def _decode_lines(results: Row) -> list[str]:
    lines = []
    for part, found in results["figures"].items():
        for transport, times in found.get("transports", {}).items():
            lines.append(
                f"{part}: {transport} {times['tokens_per_second']:,.0f} tokens/s on "
                f"{times['num_devices']} devices, p50 {times['token_p50_us'] / 1e3:.3f} ms a token"
            )
    return lines


def curves(rows: Iterable[Row]) -> dict[tuple[int, ...], dict[str, dict[int, Row]]]:
    """For each shape: operation to number of devices to the library's own figure in one process.

    Only sizes that were timed on at least two numbers of devices; bf16, all multiprocessors.
    """
    found: dict[tuple[int, ...], dict[str, dict[int, Row]]] = {}
    for row in rows:
        own = row["implementation"] not in BASELINES and row["us"] is not None
        plain = not row["wire"] and not row["num_sms"] and row["processes"] == 1
        if own and plain and row["operation"] in _CURVES:
            operations = found.setdefault(row["shape"], {})
            operations.setdefault(row["operation"], {})[row["devices"]] = row
    return {
        shape: operations
        for shape, operations in sorted(found.items(), reverse=True)
        if all(len(by_devices) > 1 for by_devices in operations.values())
    }


def draw(rows: list[Row], path: Path) -> None:
    """Time and wire bandwidth against the number of devices, a row of pictures for each size.

    Raises:
      ValueError: nothing was timed on two numbers of devices.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = curves(rows)
    if not found:
        raise ValueError("no size was timed on two numbers of devices")
    figure = Figure(figsize=(10, 3.6 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (shape, operations), (times, rates) in zip(found.items(), grid, strict=True):
        for color, (operation, by_devices) in enumerate(operations.items()):
            devices = sorted(by_devices)
            mine = [by_devices[n] for n in devices]
            times.plot(devices, [r["us"] for r in mine], f"C{color}o-", label=operation)
            floors = [r["floor_us"] for r in mine]
            times.plot(devices, floors, f"C{color}_--", label=f"{operation}, floor")
            several = [r for r in mine if r["devices"] > 1]  # a single device sends nothing
            at = [r["devices"] for r in several]
            rates.plot(at, [r["wire_gbs"] for r in several], f"C{color}o-", label=operation)
        link = max(by_devices.values(), key=lambda r: r["devices"])["link_gbs"]
        rates.axhline(link, color="black", linestyle="--", label="link, each way")
        tokens, dim, top_k, num_experts = shape
        title = f"T={tokens} D={dim} K={top_k} E={num_experts}"
        times.set(title=title, xlabel="devices", ylabel="µs a call", ylim=(0, None))
        rates.set(title=title, xlabel="devices", ylabel="GB/s on the wire", ylim=(0, None))
        for axes in (times, rates):
            axes.set_xscale("log", base=2)
            axes.set_xticks(all_devices := sorted({n for by in operations.values() for n in by}))
            axes.set_xticklabels(map(str, all_devices))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)


def _read(path: Path) -> Row:
    """A JSON object; {} for what is not there or was cut short."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
