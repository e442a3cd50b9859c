"""Tests and times the library on all GPUs of a host and on fewer of them: EP8, EP4, EP2, EP1.

    python benchmarks/scaling.py --out results            with the jaxmoe that is installed
    python benchmarks/scaling.py --out results --install  with this checkout, built first
    python benchmarks/scaling.py --list                   the parts, and how long they take
    python benchmarks/scaling.py --out results --report   table and picture of what is there

GPU tests with a device for each GPU and with several processes; dispatch, combine, their gradients
and the pair for few and for many tokens, in bfloat16 and with an FP8 wire, on all multiprocessors
and on few, beside baselines; the layer; decoding; and the exchange on 1, 2, 4 devices and so on.

It takes at most --seconds, less than ten minutes unless told otherwise: what matters least is left
out, and said to be, when it would not fit. Figures of an earlier run into the same folder stay
until their part is run again. Parts run one after the other, each within a limit of
its own; side by side run tests, and timings on GPUs that no other part uses. A part that fails
stops no other one, and its last lines are shown. Written as they come: a log and the figures of
every part, results.json with all of them, and at the end results.txt and scaling.png.

Exit code: 0, or 1 if a part failed, or 2 for options that cannot work.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import scaling_report
from scaling_parts import Part, Step, choose, make_steps

ROOT = Path(__file__).resolve().parents[1]
# What tests and benchmarks read. The package itself stays behind, so that the installed one is run.
COPIED = ("tests", "benchmarks", "examples", "docs", "tools", "xla_ffi", "pyproject.toml")
COPIED += ("README.md", "BUILD")
INSTALL_SECONDS = 150.0
RESERVE_SECONDS = 6.0  # for the report
HEARTBEAT_SECONDS = 20.0
NOISE = re.compile(r"^[WEI]\d{4} |^$")
TAIL_LINES = 25
KILLED = -signal.SIGKILL, 128 + signal.SIGKILL


@dataclasses.dataclass
class Outcome:
    """What became of a part: ok, failed, timeout, absent or dropped."""

    name: str
    status: str
    seconds: float = 0.0
    command: str = ""


class Runner:
    """Runs parts within the time of the whole, and says what is going on."""

    def __init__(self, out: Path, seconds: float, platform: str) -> None:
        self.out, self.platform = out, platform
        self.outcomes: list[Outcome] = []
        self._begin, self._seconds = time.monotonic(), seconds
        self._print, self._groups = threading.Lock(), set[int]()
        self.tree = out / "tree"

    @property
    def left(self) -> float:
        """Seconds for further parts."""
        return self._seconds - RESERVE_SECONDS - (time.monotonic() - self._begin)

    def say(self, text: str) -> None:
        with self._print:
            print(f"[{time.monotonic() - self._begin:6.1f} s] {text}", flush=True)

    def install(self) -> bool:
        """Builds the checkout and puts it beside the results."""
        command = ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        if all(map(importlib.util.find_spec, ("scikit_build_core", "nanobind"))):
            command.append("--no-build-isolation")
        command += ["--target", str(self.out / "site"), str(ROOT)]
        part = Part("install", tuple(command), (), INSTALL_SECONDS, 0)
        return self._run(part, INSTALL_SECONDS).status == "ok"

    def copy_tree(self) -> None:
        """A copy of everything but the package, which would be found before the installed one."""
        shutil.rmtree(self.tree, ignore_errors=True)
        self.tree.mkdir(parents=True)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.tree / name)

    def run(self, steps: list[Step]) -> None:
        """All steps; of each what the time allows, seeing what is still to come."""
        for i, step in enumerate(steps):
            kept = choose(steps[i:], self.left)[0]
            chosen = {part.name for lane in kept for part in lane}
            for part in (part for lane in step for part in lane):
                if part.name not in chosen:
                    self._drop(part)
            with concurrent.futures.ThreadPoolExecutor(max(len(kept), 1)) as pool:
                try:
                    list(pool.map(self._run_lane, kept))
                except BaseException:  # Control-C does not reach the parts' sessions
                    self._seconds = 0.0
                    for group in list(self._groups):
                        os.killpg(group, signal.SIGKILL)
                    raise

    def _drop(self, part: Part) -> None:
        self.say(f"{part.name}: left out, {max(self.left, 0):.0f} s are left for all that follows")
        self._keep(Outcome(part.name, "dropped"))

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        scaling_report.collect(self.out, [dataclasses.asdict(o) for o in self.outcomes])

    def _run_lane(self, lane: tuple[Part, ...]) -> None:
        for part in lane:
            if self.left < part.seconds / 2:
                self._drop(part)
                continue
            self._run(part, max(2 * part.seconds, part.seconds + 30))

    def _run(self, part: Part, limit: float) -> Outcome:
        limit = max(1.0, min(limit, self.left))
        where = f" on GPUs {','.join(map(str, part.gpus))}" if part.gpus else ""
        self.say(f"{part.name}: begins{where}, at most {limit:.0f} s")
        start, log = time.monotonic(), self.out / f"{part.name}.log"
        command = ["timeout", "-s", "KILL", f"{limit:.0f}", sys.executable, *part.arguments]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.tree if part.gpus else ROOT, env=self._environment(part),
                stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._groups.add(process.pid)
        code = self._wait(process, part.name, log)
        self._groups.discard(process.pid)
        made = self.tree / f"{part.name}.json"
        if made.exists():
            shutil.move(made, self.out / made.name)
        outcome = Outcome(part.name, "ok", time.monotonic() - start, " ".join(part.arguments))
        lines = tail(log)
        if code != 0:
            absent = any("invalid choice: 'layer'" in line for line in lines)
            outcome.status = "timeout" if code in KILLED else "absent" if absent else "failed"
        self._keep(outcome)
        last = f": {lines[-1]}" if lines and part.is_test else ""
        self.say(f"{part.name}: {outcome.status} after {outcome.seconds:.0f} s{last}")
        if outcome.status in ("failed", "timeout"):
            self.say("\n".join([f"the end of {log.name}:", *(f"    {line}" for line in lines)]))
        return outcome

    def _wait(self, process: subprocess.Popen[bytes], name: str, log: Path) -> int:
        start = time.monotonic()
        while True:
            try:
                return process.wait(HEARTBEAT_SECONDS)
            except subprocess.TimeoutExpired:
                lines = tail(log)
                last = f": {lines[-1]}" if lines else ""
                self.say(f"{name}: running for {time.monotonic() - start:.0f} s{last}")

    def _environment(self, part: Part) -> dict[str, str]:
        env = dict(os.environ)
        given = [Path(p).resolve() for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
        env["PYTHONPATH"] = os.pathsep.join(map(str, [self.out / "site", *given]))
        env["PYTHONUNBUFFERED"] = "1"
        if part.gpus and self.platform == "gpu" and not part.is_test:  # tests count the GPUs
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, part.gpus))
        elif part.gpus:
            env["JAX_PLATFORMS"] = "cpu"
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={len(part.gpus)}"
        if part.gpus and not part.is_test:  # the reference of a size is compiled once for all parts
            env["JAX_COMPILATION_CACHE_DIR"] = str(self.out / "cache")
        if self.platform == "gpu":
            env |= dict(part.variables)
        return env


def tail(log: Path) -> list[str]:
    """The last lines of a log but for those of XLA's logging, unless it has no others."""
    lines = log.read_text(errors="replace").splitlines()
    own = [line[:300] for line in lines if not NOISE.match(line)]
    return (own or [line[:300] for line in lines])[-TAIL_LINES:]


def count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return listed.stdout.count("UUID: GPU")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("scaling"), metavar="DIR", help="default: ./scaling")
    add("--seconds", type=float, default=570.0, metavar="S", help="for everything (default: 570)")
    add("--devices", type=int, metavar="N", help="a power of two (default: as many as there are)")
    add("--parts", default="", metavar="REGEX", help="only parts whose name has it, as in test|ep4")
    add("--skip", default="", metavar="REGEX", help="no parts whose name has it, as in test")
    add("--full", action="store_true", help="all sizes for all shapes; give it more --seconds")
    add("--install", action="store_true", help="build this checkout and use that")
    add("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: to try the script out")
    add("--list", action="store_true", help="list the parts that would run, and stop")
    add("--report", action="store_true", help="only make table and picture of --out again")
    args = parser.parse_args()
    if args.devices is None:
        args.devices = 4 if args.platform == "cpu" else count_gpus()
        args.devices = 1 << args.devices.bit_length() - 1 if args.devices else 0
    if args.devices == 0 and not args.report:
        parser.error("nvidia-smi lists no GPU. Say --devices N, or --platform cpu to try it out.")
    if args.devices & (args.devices - 1) or args.devices < 0:
        parser.error(f"--devices must be a power of two, got {args.devices}.")
    for name in ("parts", "skip"):
        try:
            re.compile(getattr(args, name))
        except re.error as error:
            parser.error(f"--{name} must be a regular expression, got an error: {error}.")
    return args


def select(steps: list[Step], args: argparse.Namespace) -> list[Step]:
    """The steps with only those parts that the options ask for."""

    def wanted(part: Part) -> bool:
        return bool(re.search(args.parts, part.name)) and not (
            args.skip and re.search(args.skip, part.name)
        )

    chosen = [tuple(tuple(p for p in lane if wanted(p)) for lane in step) for step in steps]
    return [step for step in chosen if any(step)]


def describe(steps: list[Step], seconds: float) -> list[str]:
    """A line for each part: whether it should fit, how long it should take."""
    fitting = {part.name for step in choose(steps, seconds) for lane in step for part in lane}
    lines = [f"{'part':<28} {'about s':>8} {'GPUs':>6}  importance"]
    for step in steps:
        for part in (part for lane in step for part in lane):
            late = "" if part.name in fitting else "  if time is left"
            lines.append(
                f"{part.name:<28} {part.seconds:8.0f} {len(part.gpus):6}  {part.importance}{late}"
            )
    return lines


def main() -> int:
    args = parse_args()
    out = args.out.resolve()
    if args.report:
        print(scaling_report.finish(out), flush=True)
        return 0
    steps = select(make_steps(args.devices, args.platform, args.full), args)
    if not steps:
        print("scaling: no part is left; see --list", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(describe(steps, args.seconds - RESERVE_SECONDS)))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(out, args.seconds, args.platform)
    runner.say(f"{args.devices} devices, at most {args.seconds:.0f} s, results in {out}")
    runner.copy_tree()
    if args.install and not runner.install():
        return 1
    runner.say("\n".join(["what is planned:", *describe(steps, runner.left)]))
    runner.run(steps)
    print(scaling_report.finish(out), flush=True)
    counts = [f"{o.name} {o.status}" for o in runner.outcomes if o.status != "ok"]
    runner.say(f"done; {', '.join(counts) if counts else 'everything ran'}")
    return 1 if any(o.status in ("failed", "timeout") for o in runner.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
