"""Run a script in several processes, one for each GPU, joined by jax.distributed.

    python -m jaxmoe launch train.py --steps 100           every GPU of this host
    python -m jaxmoe launch -n 2 -m my.training            a module on the first two
    python -m jaxmoe launch -n 2 --platform cpu --devices-per-process 4 train.py

On several hosts, the same command on each, but for --node-rank:
    python -m jaxmoe launch --nodes 2 --node-rank 0 --coordinator host0:9876 train.py

The script needs no change: before it starts, its process has called jax.distributed.initialize
and holds its own GPU. A script that also runs by itself asks jax.distributed.is_initialized().

When a rank fails, the others are ended, its last lines are shown, and its exit code is returned
(128 and the number for a signal). Ctrl-C and SIGTERM are passed on to all ranks; once more kills
them. Processes that the ranks started are ended with them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from jaxmoe.cli import _system
from jaxmoe.cli._output import Output
from jaxmoe.cli._ranks import Ranks, say

_HOST_DEVICES_FLAG = "--xla_force_host_platform_device_count"
_MEMORY_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_MEMORY_FRACTION = 0.75  # JAX's own for one process on a GPU
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class UsageError(ValueError):
    """A command line that cannot work here; the message says what to do instead."""


@dataclass(frozen=True)
class Plan:
    """What is started on this host."""

    num_ranks: int
    first_rank: int
    num_ranks_in_all: int
    coordinator: str
    gpus: tuple[int, ...]
    """The GPU of each rank here; none on CPUs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("-n", "--processes", type=int, metavar="N", help="ranks on this host; default: its GPUs")
    add("--platform", choices=("auto", "gpu", "cpu"), default="auto", help="default: auto")
    add(
        "--devices-per-process", type=int, metavar="N",
        help="CPU: virtual devices of each rank (default: what XLA_FLAGS says, or 1)",
    )  # fmt: skip
    sharing = parser.add_mutually_exclusive_group()
    sharing.add_argument(
        "--devices", metavar="I,J,…",
        help="GPU of each rank; one may stand there twice, for tests of correctness only",
    )  # fmt: skip
    sharing.add_argument(
        "--processes-per-gpu", type=int, default=1, metavar="N",
        help="ranks that share a GPU and its memory, for tests of correctness only",
    )  # fmt: skip
    add("--nodes", type=int, default=1, metavar="N", help="hosts that take part")
    add("--node-rank", type=int, metavar="I", help="number of this host, from 0")
    add("--coordinator", metavar="HOST:PORT", help="a free port of host 0; default: any, one host")
    add("--log-dir", type=Path, metavar="DIR", help="also write DIR/rank<i>.log, replacing it")
    add("-q", "--quiet", action="store_true", help="show the first rank of this host alone")
    add("--timeout", type=float, metavar="S", help="end all ranks after so many seconds (code 124)")
    add(
        "--grace", type=float, default=10.0, metavar="S",
        help="seconds from asking ranks to end to killing them (default: 10)",
    )  # fmt: skip
    add("-m", "--module", action="store_true", help="SCRIPT is the name of a module")
    add("script", metavar="SCRIPT", help="Python file, or module with -m")
    rest = add("args", nargs=argparse.REMAINDER, metavar="ARGS", help="passed on as they are")
    rest.required = False  # in the message that SCRIPT is missing


def run(args: argparse.Namespace) -> int:
    """Launch; returns the exit code."""
    try:
        _check(args)
        plan = make_plan(args)
        output = Output(args.log_dir, [plan.first_rank] if args.quiet else None)
    except (UsageError, OSError) as error:
        say(str(error))
        return 2
    if args.log_dir is not None:
        say(f"output of the ranks: {output.log_path(plan.first_rank)} and so on")
    command = [sys.executable, "-m", "jaxmoe.cli._child"]
    command += [*(["-m"] if args.module else []), args.script, *args.args]
    try:
        with Ranks(output, args.grace) as ranks:
            for i in range(plan.num_ranks):
                ranks.start(plan.first_rank + i, command, _environment(args, plan, i))
            return ranks.watch(args.timeout)
    except BrokenPipeError:
        # Nobody reads on, as behind `| head`. Python must not find that out again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _check(args: argparse.Namespace) -> None:
    """Refuses what cannot work on any machine."""
    numbers = {
        "-n": args.processes,
        "--devices-per-process": args.devices_per_process,
        "--processes-per-gpu": args.processes_per_gpu,
        "--nodes": args.nodes,
        "--timeout": args.timeout,
    }
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise UsageError(f"{name} must be positive, got {value}.")
    if args.grace < 0:
        raise UsageError(f"--grace must be at least 0, got {args.grace}.")
    if args.module:
        if importlib.util.find_spec(args.script.partition(".")[0]) is None:
            raise UsageError(f"no module named {args.script!r}. Install it, or leave -m out.")
    elif not Path(args.script).is_file():
        raise UsageError(
            f"no script {args.script!r} in {Path.cwd()}. Give a Python file, or -m and a module."
        )
    if args.nodes > 1 and (args.node_rank is None or args.coordinator is None):
        raise UsageError(
            "several --nodes need --node-rank I and --coordinator HOST:PORT, a free port of node 0."
        )
    if not 0 <= (args.node_rank or 0) < args.nodes:
        raise UsageError(f"--node-rank must be from 0 to {args.nodes - 1}, got {args.node_rank}.")


def make_plan(args: argparse.Namespace) -> Plan:
    """Ranks, GPUs and address; raises UsageError for more GPUs than there are."""
    num_gpus = 0 if args.platform == "cpu" else _count_gpus(args.platform)
    if num_gpus:
        gpus = _choose_gpus(args, num_gpus)
        num_ranks = len(gpus)
    else:
        gpus, num_ranks = (), _num_cpu_ranks(args)
    node = args.node_rank or 0
    return Plan(
        num_ranks=num_ranks,
        first_rank=node * num_ranks,
        num_ranks_in_all=args.nodes * num_ranks,
        coordinator=_coordinator(args.coordinator, node),
        gpus=gpus,
    )


def _count_gpus(platform: str) -> int:
    """GPUs to start ranks on; 0 for CPUs. Raises UsageError when there must be some."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if platform == "auto" and wanted.startswith("cpu"):
        return 0
    count = _system.count_gpus()
    has_plugin = any(importlib.util.find_spec(name) for name in _CUDA_PLUGINS)
    if platform == "gpu" and not count:
        raise UsageError("--platform gpu, but no NVIDIA GPU is visible here. Use --platform cpu.")
    if count and not has_plugin:
        problem = f"{count} GPUs, but JAX has no CUDA plugin: install jaxmoe[cuda13]"
        if platform == "gpu":
            raise UsageError(f"{problem}.")
        say(f"{problem}. Going on with CPUs.")
        return 0
    return count


def _choose_gpus(args: argparse.Namespace, num_gpus: int) -> tuple[int, ...]:
    """The GPU of each rank here."""
    if args.devices_per_process is not None:
        raise UsageError("--devices-per-process is of CPUs; a rank has one GPU. Leave it out.")
    if args.devices is not None:
        try:
            gpus = tuple(int(word) for word in args.devices.split(","))
        except ValueError:
            raise UsageError(
                f"--devices must be numbers with commas, as 0,0,1,1, got {args.devices!r}."
            ) from None
        if args.processes not in (None, len(gpus)):
            raise UsageError(
                f"-n {args.processes}, but --devices names {len(gpus)}. Leave one of them out."
            )
    else:
        gpus = tuple(gpu for gpu in range(num_gpus) for _ in range(args.processes_per_gpu))
        num_ranks = len(gpus) if args.processes is None else args.processes
        if num_ranks > len(gpus):
            raise UsageError(
                f"-n {num_ranks}, but {len(gpus)} is the most for {num_gpus} GPUs and "
                f"--processes-per-gpu {args.processes_per_gpu}. Use -n {len(gpus)}; for tests of "
                f"correctness, --processes-per-gpu {-(-num_ranks // num_gpus)} lets ranks share."
            )
        gpus = gpus[:num_ranks]
    wrong = [gpu for gpu in gpus if not 0 <= gpu < num_gpus]
    if wrong:
        raise UsageError(f"--devices: no GPU {wrong[0]}; there are 0 to {num_gpus - 1}.")
    return gpus


def _num_cpu_ranks(args: argparse.Namespace) -> int:
    if args.devices is not None or args.processes_per_gpu != 1:
        raise UsageError(
            "--devices and --processes-per-gpu are of GPUs, and these ranks run on CPUs. Use "
            "--devices-per-process."
        )
    if args.processes is None:
        raise UsageError("no GPU to count: say with -n how many ranks to start on the CPUs.")
    return int(args.processes)


def _coordinator(address: str | None, node: int) -> str:
    """The address of rank 0's service, of a port that is free here and now."""
    if address is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{free.getsockname()[1]}"
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--coordinator must be HOST:PORT, got {address!r}.")
    if node == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise UsageError(
                    f"--coordinator: port {port} cannot be had here ({error.strerror}). Choose "
                    "another, the same on all nodes."
                ) from error
    return address


def _environment(args: argparse.Namespace, plan: Plan, i: int) -> dict[str, str]:
    """Variables of the i-th rank of this host: what `_child` and JAX read."""
    env = dict(os.environ)
    env |= {
        "JAX_COORDINATOR_ADDRESS": plan.coordinator,
        "JAX_NUM_PROCESSES": str(plan.num_ranks_in_all),
        "JAX_PROCESS_ID": str(plan.first_rank + i),
        "PYTHONUNBUFFERED": "1",
    }
    if args.coordinator is None:
        # JAX would listen on all of the host's addresses.
        env["JAX_COORDINATOR_BIND_ADDRESS"] = plan.coordinator
    env.pop("JAX_LOCAL_DEVICE_IDS", None)
    if plan.gpus:
        env["JAX_LOCAL_DEVICE_IDS"] = str(plan.gpus[i])
        # Without this JAX takes the CPU when it cannot start CUDA.
        env.setdefault("JAX_PLATFORMS", "cuda,cpu")
        sharing = max(plan.gpus.count(gpu) for gpu in plan.gpus)
        if sharing > 1:
            env.setdefault(_MEMORY_VARIABLE, f"{_MEMORY_FRACTION / sharing:.3f}")
    else:
        env["JAX_PLATFORMS"] = "cpu"
    if args.devices_per_process is not None:
        flags = [f for f in env.get("XLA_FLAGS", "").split() if _HOST_DEVICES_FLAG not in f]
        flags.append(f"{_HOST_DEVICES_FLAG}={args.devices_per_process}")
        env["XLA_FLAGS"] = " ".join(flags)
    return env
