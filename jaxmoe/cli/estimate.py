"""Bytes on the wire, memory and floor times of MoE layers, for every way to split the devices.

python -m jaxmoe estimate --dim 7168 --hidden-dim 2048 --experts 256 --top-k 8 --tokens 32768
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from jaxmoe import estimate

_GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the batch, the machine."""
    machine = estimate.Machine()
    model = parser.add_argument_group("model")
    model.add_argument("--dim", type=int, required=True, help="width of a token")
    model.add_argument("--hidden-dim", type=int, required=True, help="hidden width of an expert")
    model.add_argument("--experts", type=int, required=True, help="routed experts of a layer")
    model.add_argument("--top-k", type=int, required=True, help="experts per token")
    model.add_argument("--layers", type=int, default=1, help="MoE layers (default 1)")
    model.add_argument("--shared-experts", type=int, default=0, help="per layer (default 0)")
    model.add_argument("--dtype-bytes", type=int, default=2, help="of rows, weights (default 2)")
    model.add_argument(
        "--capacity-factor",
        type=float,
        default=1.25,
        help="of the expert buffers (default 1.25); 0 for the worst case",
    )
    model.add_argument("--fp8-wire", action="store_true", help="dispatch sends tokens in FP8")
    batch = parser.add_argument_group("batch")
    batch.add_argument("--tokens", type=int, required=True, help="of a step, all devices together")
    batch.add_argument("--inference", action="store_true", help="forward pass only")
    batch.add_argument("--remat", action="store_true", help="recompute layers backward")
    batch.add_argument("--imbalance", type=float, default=1.0, help="busiest device by the mean")
    devices = parser.add_argument_group("machine (default: 8 H100 SXM)")
    devices.add_argument("--devices", type=int, default=machine.num_devices)
    devices.add_argument("--devices-per-node", type=int, default=machine.devices_per_node)
    for name, field, unit, text in _MACHINE_NUMBERS:
        default = getattr(machine, field) / unit
        devices.add_argument(
            f"--{name}", type=float, default=default, help=f"{text} (default {default:g})"
        )
    split = parser.add_argument_group("split (default: all that fit)")
    for name in ("ep", "dp", "tp"):
        split.add_argument(f"--{name}", type=int, help=f"show only this {name}")
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")


_MACHINE_NUMBERS = (
    ("link", "link_bytes_per_second", 1e9, "GB/s of a device on its node, each way"),
    ("network", "network_bytes_per_second", 1e9, "GB/s of a device to other nodes"),
    ("memory", "memory_bytes", 1e9, "GB of a device"),
    ("memory-bandwidth", "memory_bytes_per_second", 1e12, "TB/s of a device"),
    ("tflops", "flops", 1e12, "TFLOP/s of a device"),
)


def run(args: argparse.Namespace) -> int:
    """Prints the table, or what is wrong with the sizes."""
    try:
        found = _estimates(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([_as_json(e) for e in found], indent=2))
    else:
        print(_table(found))
    return 0


def _estimates(args: argparse.Namespace) -> list[estimate.Estimate]:
    model = estimate.Model(
        dim=args.dim,
        hidden_dim=args.hidden_dim,
        num_experts=args.experts,
        top_k=args.top_k,
        num_layers=args.layers,
        num_shared_experts=args.shared_experts,
        dtype_bytes=args.dtype_bytes,
        capacity_factor=args.capacity_factor or None,
        fp8_wire=args.fp8_wire,
    )
    numbers = {
        field: getattr(args, name.replace("-", "_")) * unit
        for name, field, unit, _ in _MACHINE_NUMBERS
    }
    machine = estimate.Machine(
        num_devices=args.devices, devices_per_node=args.devices_per_node, **numbers
    )
    found = estimate.splits(
        model,
        machine,
        args.tokens,
        training=not args.inference,
        remat=args.remat,
        imbalance=args.imbalance,
    )
    asked = {name: getattr(args, name) for name in ("ep", "dp", "tp")}
    kept = [
        e for e in found if all(v is None or getattr(e.split, k) == v for k, v in asked.items())
    ]
    if not kept:
        raise ValueError(
            f"`estimate`: no split with {asked} fits {args.devices} devices and their memory. Drop "
            "--ep, --dp and --tp to see those that do."
        )
    return kept


def _as_json(e: estimate.Estimate) -> dict[str, Any]:
    return dataclasses.asdict(e) | {"memory_bytes": e.memory_bytes, "seconds": e.seconds}


def _table(found: list[estimate.Estimate]) -> str:
    head = (
        "ep x dp x tp", "tokens", "dest.", "dispatch", "combine", "per choice", "heap", "params",
        "activ.", "memory", "wire", "experts", "copies", "reduce", "total",
    )  # fmt: skip
    units = (
        "", "/device", "/token", "MB/layer", "MB/layer", "MB/layer", "GiB", "GiB",
        "GiB", "GiB", "ms", "ms", "ms", "ms", "ms",
    )  # fmt: skip
    rows = [head, units, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    notes = (
        "Per device. dispatch, combine: sent forward, one copy per token and device; per choice: "
        "both together, with one copy per choice.",
        "Times are floors of a whole step, one after the other; the fastest split comes first.",
    )
    return "\n".join([*lines, "", *notes])


def _row(e: estimate.Estimate) -> tuple[str, ...]:
    split = f"{e.split.ep} x {e.split.dp} x {e.split.tp}"
    per_choice = e.dispatch_bytes_per_choice + e.combine_bytes_per_choice
    megabytes = (e.dispatch_bytes, e.combine_bytes, per_choice)
    gibibytes = (e.heap_bytes, e.parameter_bytes, e.activation_bytes, e.memory_bytes)
    times = (e.wire_seconds, e.expert_seconds, e.copy_seconds, e.reduce_seconds, e.seconds)
    return (
        split,
        str(e.tokens),
        f"{e.destinations:.2f}",
        *(f"{b / 1e6:.1f}" for b in megabytes),
        *(f"{b / _GIB:.2f}" for b in gibibytes),
        *(f"{1e3 * s:.3f}" for s in times),
    )
