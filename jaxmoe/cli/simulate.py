"""What placements of experts would do with a load over time: balance, rows on the wire, moves.

python -m jaxmoe simulate --devices 8 64 --loads drifting bursts --steps 200 --plot balance.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmoe.balance.simulation import Course, Simulation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The load, the devices, the policies, and where the results go."""
    load = parser.add_argument_group("load")
    load.add_argument("--loads", nargs="+", default=["zipf"], help="zipf, drifting, bursts")
    load.add_argument("--recorded", type=Path, help="metrics.jsonl of a run, or .npy, instead")
    load.add_argument("--layer", type=int, default=0, help="of the recorded loads (default 0)")
    load.add_argument("--steps", type=int, default=100, help="of synthetic loads (default 100)")
    load.add_argument("--experts", type=int, default=256, help="of synthetic loads (default 256)")
    load.add_argument("--exponent", type=float, default=1.2, help="of Zipf's law (default 1.2)")
    load.add_argument("--seed", type=int, default=0)
    devices = parser.add_argument_group("devices")
    devices.add_argument("--devices", type=int, nargs="+", default=[32], help="default 32")
    devices.add_argument("--devices-per-node", type=int, default=8, help="default 8")
    devices.add_argument("--redundant", type=int, default=1, help="slots per device (default 1)")
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--top-k", type=int, default=8, help="default 8")
    tokens.add_argument("--tokens", type=int, default=64, help="per device (default 64)")
    tokens.add_argument("--topics", type=int, default=16, help="default 16; 1 for none")
    policy = parser.add_argument_group("policies")
    policy.add_argument("--policies", nargs="+", help="static, eplb, affinity, migrating")
    policy.add_argument("--every", type=int, default=10, help="steps between looks (default 10)")
    policy.add_argument("--decay", type=float, default=0.9, help="of averages (default 0.9)")
    policy.add_argument("--max-moves", type=int, default=8, help="of migrating (default 8)")
    policy.add_argument("--min-gain", type=float, default=0.05, help="hysteresis (default 0.05)")
    parser.add_argument("--json", action="store_true", help="every step, as JSON")
    parser.add_argument("--plot", type=Path, help="PNG file for the pictures")


def run(args: argparse.Namespace) -> int:
    """Prints the table, or what is wrong."""
    from jaxmoe.balance import plots

    try:
        found = _simulate(args)
        if args.plot is not None:
            plots.draw_simulation({title: courses for title, _, courses in found}, args.plot)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(_as_json(found) if args.json else _table(found, args.every))
    return 0


def _simulate(args: argparse.Namespace) -> list[tuple[str, Simulation, dict[str, Course]]]:
    from jaxmoe.balance import MoveRule, recorded_loads, simulate, synthetic_loads
    from jaxmoe.balance.simulation import POLICIES, Simulation

    if args.recorded is not None:
        loads = {args.recorded.name: recorded_loads(args.recorded, args.layer)}
    else:
        sizes = dict(num_steps=args.steps, num_experts=args.experts)
        loads = {
            name: synthetic_loads(name, **sizes, exponent=args.exponent, seed=args.seed)
            for name in args.loads
        }
    found = []
    for devices in args.devices:
        config = Simulation(
            num_devices=devices,
            devices_per_node=args.devices_per_node,
            redundant=args.redundant,
            top_k=args.top_k,
            num_tokens=args.tokens,
            num_topics=args.topics,
            every=args.every,
            decay=args.decay,
            rule=MoveRule(max_moves=args.max_moves, min_gain=args.min_gain, horizon=args.every),
            seed=args.seed,
        )
        for name, load in loads.items():
            fitting = tuple(p for p in POLICIES if p != "affinity" or devices <= load.shape[1])
            courses = simulate(load, config, tuple(args.policies or fitting))
            found.append((f"{name}, {devices} devices", config, courses))
    return found


def _as_json(found: list[tuple[str, Simulation, dict[str, Course]]]) -> str:
    entries: list[dict[str, Any]] = [
        {
            "title": title,
            "config": dataclasses.asdict(config),
            "policies": {name: dataclasses.asdict(course) for name, course in courses.items()},
        }
        for title, config, courses in found
    ]
    return json.dumps(entries)


def _table(found: list[tuple[str, Simulation, dict[str, Course]]], first: int) -> str:
    head = ("", "policy", "mean", "worst", "to devices", "to nodes", "first moves", "moves")
    rows: list[tuple[str, ...]] = [head]
    for title, _, courses in found:
        for name, course in courses.items():
            figures = course.summary(min(first, len(course.moves) - 1)).values()
            rows.append((title, name, *map(str, figures)))
            title = ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    notes = (
        "mean, worst: load of the busiest device by the mean, over the steps after the first look.",
        "to devices, to nodes: rows that a token sends, one per destination. moves: slots changed.",
    )
    return "\n".join([*(line.rstrip() for line in lines), "", *notes])
