"""The part of `python -m jaxmoe bench layer` that reads options and reports."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import bench

if TYPE_CHECKING:
    from jaxmoe.bench.layer import LayerSettings, LayerShape

# F, the experts' hidden width, of the models that the shapes are named after.
HIDDEN_DIMS = {
    "deepseek": 2048,
    "deepseek-8k": 2048,
    "deepseek-1k": 2048,
    "qwen3": 768,
    "mixtral": 14336,
    "decode": 2048,
    "tiny": 128,
}
_TRANSPORTS = ("cpu", "p2p", "nvshmem", "xla")
_BREAKDOWNS = ("own", "all", "off")
_LIMIT = 300.0  # seconds
# The other benchmark's options, and what they are when nobody gives them.
_NOT_HERE = {
    "baselines": "on",
    "operations": "all",
    "clocks": "all",
    "link_gbs": None,
    "hbm_gbs": None,
    "plot": None,
}
_ONLY_HERE = ("hidden_dim", "combinations", "breakdown", "time_limit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench layer` alone."""
    add = parser.add_argument_group("bench layer").add_argument
    add("--hidden-dim", type=int, metavar="F", help="of an expert; the named shapes have their own")
    add(
        "--combinations", metavar="LIST",
        help="of TRANSPORT+BACKEND as in p2p+cuda,xla+tokamax; the others are compared with the "
        "first that runs (default: the library's own, and xla with each backend)",
    )  # fmt: skip
    add("--breakdown", choices=_BREAKDOWNS, help="which to take apart (default: own)")
    add(
        "--time-limit", type=float, metavar="S",
        help=f"seconds for each combination, compilation included (default: {_LIMIT:g})",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuses the other benchmark's options."""
    if args.what != "layer":
        given = [name for name in _ONLY_HERE if getattr(args, name) is not None]
        if given:
            raise bench.UsageError(
                f"{_flag(given[0])} is an option of 'bench layer'. Leave it out."
            )
        return
    given = [name for name, default in _NOT_HERE.items() if getattr(args, name) != default]
    if given:
        raise bench.UsageError(f"{_flag(given[0])} is no option of 'bench layer'. Leave it out.")
    if args.hidden_dim is not None and args.hidden_dim < 1:
        raise bench.UsageError(f"--hidden-dim must be at least 1, got {args.hidden_dim}.")
    limit = args.time_limit
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise bench.UsageError(f"--time-limit must be a positive number of seconds, got {limit}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def measure(args: argparse.Namespace, defaults: Any) -> int:
    """Measures and reports; returns the exit code."""
    import jax

    from jaxmoe.bench import layer, layer_report, report

    shapes, settings = make_shapes(args, defaults.shapes), make_settings(args, defaults)
    mesh = bench.make_mesh(args.devices)
    first = jax.process_index() == 0
    say: Callable[[str], None] = functools.partial(print, flush=True) if first else lambda _: None
    say("\n".join(layer_report.heading(mesh.size)))
    reports = []
    for shape in shapes:
        try:
            prepared = layer.LayerBench(mesh, shape, settings)
        except (ValueError, RuntimeError) as error:  # sentences of ExpertParallel
            raise bench.UsageError(str(error)) from error
        title = f"T={shape.tokens} D={shape.dim}"
        with bench.progress(title, prepared.num_steps(), first) as step:
            reports.append(prepared.run(step))
        say("\n".join(layer_report.table(reports[-1])))
        if first and args.json:
            options = {name: bench.plain(v) for name, v in vars(args).items() if name != "run"}
            report.write_json(args.json, layer_report.as_json(reports, options, mesh.size))
        if reports[-1].running:
            break
        prepared.close()
    code = 0 if all(r.own_is_right() for r in reports) else 1
    if reports[-1].running:  # a thread that nothing can stop but the end of the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def make_shapes(args: argparse.Namespace, default: str) -> list[LayerShape]:
    """The shapes of a command line."""
    from jaxmoe.bench.layer import LayerShape

    shapes = []
    for listed in bench.split(args.shapes or default):
        for name in bench.SETS.get(listed, (listed,)):
            hidden = args.hidden_dim or HIDDEN_DIMS.get(name)
            own = argparse.Namespace(**{**vars(args), "shapes": name})
            for shape in bench.make_shapes(own, name):
                if hidden is None:
                    raise bench.UsageError(
                        f"shape {name} has no hidden width of its own. Give --hidden-dim."
                    )
                shapes.append(LayerShape(**dataclasses.asdict(shape), hidden_dim=hidden))
    return list(dict.fromkeys(shapes))


def make_settings(args: argparse.Namespace, defaults: Any) -> LayerSettings:
    """What a command line asks for on every shape."""
    from jaxmoe.bench.layer import LayerSettings

    common = bench.make_settings(args, defaults)
    return LayerSettings(
        load=common.load,
        dtype=common.dtype,
        transport=common.transport,
        combinations=_combinations(args.combinations),
        breakdown=args.breakdown or "own",
        num_sms=common.num_sms,
        capacity_factor=common.capacity_factor,
        repeats=common.repeats,
        iterations=common.iterations,
        seconds=common.seconds,
        limit=args.time_limit or _LIMIT,
        wire_dtype=common.wire_dtype,
        mode=common.mode,
    )


def _combinations(text: str | None) -> tuple[str, ...]:
    from jaxmoe.products import BACKENDS

    names = tuple(bench.split(text or ""))
    backends = tuple(b for b in BACKENDS if b != "auto")
    for name in names:
        transport, _, backend = name.partition("+")
        if transport not in _TRANSPORTS or backend not in backends:
            raise bench.UsageError(
                f"--combinations must be a list of TRANSPORT+BACKEND, of {', '.join(_TRANSPORTS)} "
                f"and {', '.join(backends)}, got {name!r}."
            )
    return names
