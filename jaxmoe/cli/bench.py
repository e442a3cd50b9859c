"""Measure dispatch, combine, their gradients and the pair on this machine, beside baselines.

    python -m jaxmoe bench --shapes table --json results.json     all devices of this process
    python -m jaxmoe launch -m jaxmoe bench --tokens 1024,4096    one process for each GPU
    python -m jaxmoe bench --routing zipf:1.2 --num-sms 24 --baselines allgather
    python -m jaxmoe bench layer                                  a whole MoE layer and its parts

Two clocks: the wall clock of a loop of calls inside one jit, less that of an empty loop; on GPUs
also CUDA events around every call, all its kernels counted. Baselines, checked before they are
timed: "xla" (transport="xla", plain collectives), "allgather" (all-gather of tokens, reduce-scatter
of sums), "ragged" and "ragged-nccl" (lax.ragged_all_to_all with XLA's one-shot kernel and without).
"of floor" is the time that links or memory need at least, over the time taken: 1.00 is best.

`bench layer` times `jaxmoe.MoE` forward and with its gradients, against the same layer with plain
collectives and each kind of expert products, and a dense product of as many rows.

Exit code: 0, or 1 if the library's own exchange failed or gave a wrong result, or 2 for options
that cannot work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import bench_layer

if TYPE_CHECKING:
    import jax

    from jaxmoe.bench.exchange import Settings, Shape, ShapeReport
    from jaxmoe.bench.floors import Machine

# T, D, K, E: what DeepSeek-V3 trains and serves with, at three sizes; Qwen3-30B-A3B; Mixtral 8x7B.
SHAPES = {
    "deepseek": (4096, 7168, 8, 256),
    "deepseek-8k": (8192, 7168, 8, 256),
    "deepseek-1k": (1024, 7168, 8, 256),
    "qwen3": (4096, 2048, 8, 128),
    "mixtral": (4096, 4096, 2, 8),
    "decode": (128, 7168, 8, 256),
    "tiny": (256, 256, 2, 16),
}
SETS = {"table": ("deepseek", "deepseek-8k", "deepseek-1k", "qwen3", "mixtral")}
_OPERATIONS = ("dispatch", "combine", "dispatch_grad", "combine_grad", "pair")
_BASELINES = ("xla", "allgather", "ragged", "ragged-nccl")
_CLOCKS = ("loop", "events")
_HOST_DEVICES = 4  # virtual ones, where nobody has asked for a number
_HOST_DEVICES_FLAG = "xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class _Defaults:
    """What a platform takes where the command line says nothing."""

    shapes: str
    dtype: str
    repeats: int
    iterations: int
    seconds: float


_DEFAULTS = {
    "gpu": _Defaults("deepseek", "bfloat16", 7, 100, 0.3),
    "cpu": _Defaults("tiny", "float32", 3, 20, 0.04),
}


class UsageError(ValueError):
    """Options that cannot work; the message says what to do instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("what", nargs="?", default="exchange", choices=("exchange", "layer"),
        help="default: exchange")  # fmt: skip
    _add_load(parser)
    add("--devices", type=int, metavar="N", help="use the first N (default: all)")
    add("--transport", default="auto", help="of the library's own exchange (default: auto)")
    add("--num-sms", type=int, metavar="N", help="multiprocessors for its kernels (default: all)")
    add(
        "--capacity-factor", default="auto", metavar="F",
        help="a number, none (worst case) or auto: just what the routing needs (default)",
    )  # fmt: skip
    add("--baselines", default="on", metavar="LIST", help=f"on, off or of {', '.join(_BASELINES)}")
    add("--operations", default="all", metavar="LIST", help=f"of {', '.join(_OPERATIONS)}")
    add("--clocks", default="all", metavar="LIST", help=f"of {', '.join(_CLOCKS)} (default: both)")
    add("--repeats", type=int, metavar="N", help="measured runs of each program")
    add("--iterations", type=int, metavar="N", help="most calls in a run")
    add("--link-gbs", type=float, metavar="GBS", help="of a link, each way (default: as measured)")
    add(
        "--hbm-gbs", type=float, metavar="GBS", help="of memory, read + written (default: likewise)"
    )
    add("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    add("--plot", type=Path, metavar="FILE", help="write a picture to FILE (needs matplotlib)")
    bench_layer.add_arguments(parser)


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join([*SHAPES, *SETS])
    add("--shapes", metavar="LIST", help=f"names ({names}) or TxDxKxE")
    add("--tokens", metavar="LIST", help="T, tokens per device; each shape with each of them")
    add("--dim", type=int, metavar="D", help="instead of the shapes' own")
    add("--top-k", type=int, metavar="K", help="likewise")
    add("--num-experts", type=int, metavar="E", help="likewise")
    add("--routing", default="uniform", help="uniform (default), zipf:S as in zipf:1.2, or hot")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16, on CPUs float32",
    )
    add(
        "--wire-dtype",
        choices=("float8_e4m3fn",),
        help="what tokens are on their way to the experts (default: as --dtype)",
    )
    add(
        "--mode",
        choices=("auto", "throughput", "low_latency"),
        default="auto",
        help="which of the kernels for GPUs run (default: auto, by the number of tokens)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit code."""
    try:
        _check(args)
        _make_host_devices()
        return _measure(args)
    except (UsageError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    import jax

    from jaxmoe.bench import machine, report

    defaults = _DEFAULTS.get(jax.default_backend(), _DEFAULTS["cpu"])
    if args.what == "layer":
        return bench_layer.measure(args, defaults)
    shapes, settings = make_shapes(args, defaults.shapes), make_settings(args, defaults)
    mesh = make_mesh(args.devices)
    limits = machine.bandwidths(mesh, args.link_gbs, args.hbm_gbs)
    first = jax.process_index() == 0
    say: Callable[[str], None] = functools.partial(print, flush=True) if first else lambda _: None
    say("\n".join(report.heading(limits, mesh.size)))
    reports = []
    for shape in shapes:
        reports.append(_one_shape(mesh, shape, settings, limits, first))
        say("\n".join(report.table(reports[-1])))
        if first and args.json:  # what is there outlives a run that is cut short
            options = {name: plain(value) for name, value in vars(args).items() if name != "run"}
            report.write_json(args.json, report.as_json(reports, limits, options, mesh.size))
    if first and args.plot:
        report.plot(args.plot, reports)
    return 0 if all(r.own_is_right() for r in reports) else 1


def _one_shape(
    mesh: jax.sharding.Mesh, shape: Shape, settings: Settings, limits: Machine, first: bool
) -> ShapeReport:
    from jaxmoe.bench import exchange

    try:
        prepared = exchange.Exchange(mesh, shape, settings, limits)
    except (ValueError, RuntimeError) as error:  # sentences of ExpertParallel
        raise UsageError(str(error)) from error
    try:
        total = len(prepared.implementations()) * len(settings.operations)
        with progress(f"T={shape.tokens} D={shape.dim}", total, first) as step:
            return prepared.run(step)
    finally:
        prepared.close()


@contextlib.contextmanager
def progress(title: str, total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """Something to call with what is done next: a bar on a terminal, else lines, on stderr."""
    if not shown:
        yield lambda _: None
        return
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total, desc=title, file=sys.stderr, leave=False) as bar:

            def advance(text: str) -> None:
                bar.set_postfix_str(text)
                bar.update()

            yield advance
        return
    done = itertools.count(1)
    yield lambda text: print(f"{title}: {text} ({next(done)}/{total})", file=sys.stderr, flush=True)


def _check(args: argparse.Namespace) -> None:
    """Refuses what cannot work on any machine, before anything slow is imported or started."""
    bench_layer.check(args)
    for name in ("dim", "top_k", "num_experts", "devices", "num_sms", "repeats", "iterations"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    for name in ("link_gbs", "hbm_gbs"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(
                f"--{name.replace('_', '-')} must be a positive number of GB/s, got {value}. "
                "Leave it out to have it measured."
            )
    for path in (args.json, args.plot):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent} for {path.name}. Make it first.")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UsageError("--plot needs matplotlib. Install it, or write --json alone.")


def make_shapes(args: argparse.Namespace, default: str) -> list[Shape]:
    """The shapes of a command line."""
    from jaxmoe.bench.exchange import Shape

    names = split(args.shapes or default)
    named = [_shape(single) for name in names for single in SETS.get(name, (name,))]
    own = {"dim": args.dim, "top_k": args.top_k, "num_experts": args.num_experts}
    changed = {name: value for name, value in own.items() if value is not None}
    shapes = []
    for T, D, K, E in named:
        for tokens in _tokens(args.tokens) or [T]:
            shape = dataclasses.replace(Shape(tokens, D, K, E), **changed)
            if shape.top_k > shape.num_experts:
                raise UsageError(
                    f"top_k ({shape.top_k}) is more than num_experts ({shape.num_experts}) in "
                    f"shape {T}x{D}x{K}x{E}. Give a smaller --top-k or more --num-experts."
                )
            if shape not in shapes:
                shapes.append(shape)
    return shapes


def _shape(name: str) -> tuple[int, int, int, int]:
    if name in SHAPES:
        return SHAPES[name]
    try:
        T, D, K, E = (int(number) for number in name.split("x"))
    except ValueError:
        T = D = K = E = 0
    if min(T, D, K, E) < 1:
        raise UsageError(
            f"--shapes knows {', '.join([*SHAPES, *SETS])} and sizes TxDxKxE as in 4096x7168x8x256 "
            f"(tokens, dim, top_k, experts), got {name!r}."
        )
    return T, D, K, E


def _tokens(text: str | None) -> list[int]:
    try:
        tokens = [int(number) for number in split(text or "")]
    except ValueError:
        tokens = [0]
    if tokens and min(tokens) < 1:
        raise UsageError(f"--tokens must be whole numbers from 1, as in 128,4096, got {text!r}.")
    return tokens


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def make_settings(args: argparse.Namespace, defaults: _Defaults) -> Settings:
    """What a command line asks for on every shape."""
    from jaxmoe.bench import loads
    from jaxmoe.bench.exchange import Settings

    try:
        load = loads.parse(args.routing)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Settings(
        load=load,
        dtype=args.dtype or defaults.dtype,
        transport=args.transport,
        baselines=_choose("baselines", args.baselines, _BASELINES, on="on", off="off"),
        operations=_choose("operations", args.operations, _OPERATIONS),
        clocks=_choose("clocks", args.clocks, _CLOCKS),
        num_sms=args.num_sms,
        capacity_factor=_capacity_factor(args.capacity_factor),
        repeats=args.repeats or defaults.repeats,
        iterations=args.iterations or defaults.iterations,
        seconds=defaults.seconds,
        wire_dtype=args.wire_dtype,
        mode=args.mode,
    )


def _choose(
    option: str, text: str, known: tuple[str, ...], on: str = "all", off: str | None = None
) -> tuple[str, ...]:
    """Those of `known` that a list names, in the order of `known`."""
    if text == on:
        return known
    if text == off:
        return ()
    asked = split(text)
    wrong = [name for name in asked if name not in known]
    if wrong or not asked:
        words = f"{on!r}, {off!r}" if off else repr(on)
        raise UsageError(
            f"--{option} must be {words} or a list of {', '.join(known)}, got {text!r}."
        )
    return tuple(name for name in known if name in asked)


def _capacity_factor(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor > 0):
        raise UsageError(
            f"--capacity-factor must be a positive number, 'none' (room for the worst case) or "
            f"'auto' (just what the routing needs), got {text!r}."
        )
    return factor


def make_mesh(num_devices: int | None) -> jax.sharding.Mesh:
    """A mesh of one axis over the first `num_devices`, or all, devices of all processes."""
    import jax
    import numpy as np

    devices = jax.devices()
    if num_devices is not None and num_devices > len(devices):
        raise UsageError(f"--devices must be at most the {len(devices)} here, got {num_devices}.")
    if num_devices not in (None, len(devices)) and jax.process_count() > 1:
        raise UsageError(
            f"--devices {num_devices} would leave out some of the {len(devices)} devices of "
            f"{jax.process_count()} processes. Launch fewer processes instead."
        )
    return jax.sharding.Mesh(np.array(devices[:num_devices]), ("expert",))


def _make_host_devices() -> None:
    """Several virtual CPU devices, unless the user has said how many or JAX has begun."""
    import jax

    asked = _HOST_DEVICES_FLAG in os.environ.get("XLA_FLAGS", "")
    if asked or "JAX_NUM_CPU_DEVICES" in os.environ or jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # it has begun: its devices are there already
        jax.config.update("jax_num_cpu_devices", _HOST_DEVICES)


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
