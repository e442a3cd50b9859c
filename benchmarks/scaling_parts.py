"""The parts of `scaling.py`: commands, the GPUs that they take, and about how long they take."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

# A part of a step waits for those of the step before; the lanes of a step run side by side.
Lane = tuple["Part", ...]
Step = tuple[Lane, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
      name: of the part and of its log; what it measures goes to `NAME.json`.
      arguments: of the Python interpreter.
      gpus: the GPUs that it sees; on CPUs only their number counts.
      seconds: about how long it takes on a host with H200 GPUs and an empty compilation cache.
      importance: 1 is what matters most; when time is short, the highest ones are left out.
      variables: of its environment.
      is_test: tests may share GPUs with tests; nothing else shares any.
    """

    name: str
    arguments: tuple[str, ...]
    gpus: tuple[int, ...]
    seconds: float
    importance: int
    variables: tuple[tuple[str, str], ...] = ()
    is_test: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured on a platform.

    Attributes:
      shapes: D, K, E; the first one is measured in most detail.
      small, large: tokens per device, as in decoding and as in training; the first ones of each
        are those of the curves against the number of devices.
      clock: that of `jaxmoe bench` for all of them; few tokens are also timed in a loop.
      decode: options of decode_loop.py.
    """

    shapes: tuple[tuple[int, int, int], ...]
    small: tuple[int, ...]
    large: tuple[int, ...]
    clock: str
    decode: tuple[str, ...]


SIZES = {
    # DeepSeek-V3; models of 4096 and 2048 with 128 experts; Mixtral 8x7B.
    "gpu": Sizes(
        ((7168, 8, 256), (4096, 8, 128), (2048, 8, 128), (4096, 2, 8)),
        (128, 1, 64, 8),
        (4096, 8192, 1024),
        "events",
        ("--steps", "128", "--repeats", "2"),
    ),
    "cpu": Sizes(
        ((32, 2, 16), (16, 2, 8)),
        (2, 1),
        (32, 64),
        "loop",
        ("--preset", "tiny", "--steps", "8", "--repeats", "1", "--batch", "2"),
    ),
}
FEW_SMS = 24  # what is left to the exchange beside a computation, as in DeepEP's tables
# Autotuning of each matrix product takes longer than all the rest.
_CUBLAS = (("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false"),)
_EXCHANGE_SECONDS = 9.0  # start of a process, all its GPUs and NCCL
_SHAPE_SECONDS = 4.5  # the reference and what it is compared with
_PROGRAM_SECONDS = 0.8


def choose(steps: list[Step], seconds: float) -> list[Step]:
    """The steps without the least important parts, of equal ones the last, so that they fit."""
    kept = [part for step in steps for lane in step for part in lane]
    while kept and sum(map(duration, steps)) > seconds:
        worst = max(kept, key=lambda part: (part.importance, kept.index(part)))
        kept.remove(worst)
        steps = [tuple(tuple(p for p in lane if p in kept) for lane in step) for step in steps]
    return steps


def duration(step: Step) -> float:
    """About how many seconds a step takes: those of its longest lane."""
    return max((sum(part.seconds for part in lane) for lane in step), default=0.0)


def make_steps(num_devices: int, platform: str, full: bool = False) -> list[Step]:
    """All parts for a host, in the order in which they run: what matters most comes first.

    Args:
      num_devices: GPUs to use, or virtual CPU devices.
      platform: gpu or cpu.
      full: the whole table, with all sizes for all shapes; it takes longer than ten minutes.
    """
    sizes, every = SIZES[platform], tuple(range(num_devices))
    steps = _tests(num_devices) if platform == "gpu" else []
    steps += _exchanges(sizes, every) + _programs(sizes, num_devices, platform)
    if full:
        steps += _whole_table(sizes, every, platform)
    return sorted(steps, key=lambda step: min(p.importance for lane in step for p in lane))


def _tests(n: int) -> list[Step]:
    """Tests side by side mostly compile; too many of them would keep one another from the GPUs."""
    has_workers = importlib.util.find_spec("xdist") is not None
    pytest = ("-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "--tb=short")

    def lane(name: str, num: int, importance: int, workers: int, *arguments: str) -> Lane:
        variables = (
            ("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
            ("JAXMOE_REQUIRE_GPUS", str(num)),
            ("JAXMOE_TEST_SECONDS", "90"),
        )
        side_by_side = ("-n", str(workers)) if has_workers and workers > 1 else ()
        command = (*pytest, *arguments, *side_by_side)
        seconds = 25 + 120 / (workers if has_workers else 1) if workers > 1 else 25
        return (Part(name, command, tuple(range(n)), seconds, importance, variables, True),)

    first = [lane("test-balance", n, 1, 1, "tests/test_gpu_balance.py")]
    if n > 1:
        first.insert(0, lane(f"test-ep{n}", n, 1, 5, "tests/test_gpu.py"))
    later = [lane("test-ep4", 4, 5, 3, "tests/test_gpu.py")] if n > 4 else []
    processes = ("tests/test_gpu_processes.py", "-k", "exchanges and (EP4 or EP8)")
    later.append(lane("test-processes", min(n, 4), 5, 3, *processes))
    return [tuple(first), tuple(later)]


def _exchanges(sizes: Sizes, every: tuple[int, ...]) -> list[Step]:
    n, main, others = len(every), sizes.shapes[:1], sizes.shapes[1:]
    many, few = sizes.large[:1], sizes.small[:2]
    both, loop = "dispatch,combine,pair", f"loop,{sizes.clock}"
    fp8, sms = ("--wire-dtype", "float8_e4m3fn"), ("--num-sms", str(FEW_SMS))

    def add(
        name: str, importance: int, *arguments: Any, clocks: str = sizes.clock, **more: Any
    ) -> None:
        part = exchange(f"ep{n}-{name}", every, importance, *arguments, clocks=clocks, **more)
        steps.append(((part,),))

    steps: list[Step] = []
    add("large", 2, main, sizes.large)
    add("small", 3, main, few, both, clocks=loop)
    add("fp8", 3, main, many + few[:1], both, fp8)
    steps += [_fewer_devices(sizes, n)] if n > 1 else []
    add("baselines", 5, main, many, both, baselines="xla,allgather,ragged")
    add("shapes", 6, others, many)
    add("shapes-fp8", 8, others, many, "dispatch", fp8)
    if sizes is SIZES["gpu"]:
        add("sms", 8, main, many, "all", sms)
    if sizes.small[2:]:
        add("small-rest", 9, main, sizes.small[2:], both, clocks=loop)
    return steps


def _fewer_devices(sizes: Sizes, n: int) -> Step:
    """Half as many devices, a quarter and so on, on GPUs of their own; the last two in turn.

    On a pair of GPUs that is left the step of a layer with skewed routing.
    """
    lanes, first, count = [], 0, n // 2
    while count >= 1:
        counts = [count, 1] if count == 2 else [count]
        parts = []
        for num in counts:
            gpus = tuple(range(first, first + num))
            tokens = (sizes.large[0], sizes.small[0])
            operations = "dispatch,combine,pair"
            parts.append(
                exchange(
                    f"ep{num}", gpus, 4, sizes.shapes[:1], tokens, operations, clocks=sizes.clock
                )
            )
        lanes.append(tuple(parts))
        first, count = first + count, 0 if counts[-1] == 1 else count // 2
    if sizes is SIZES["gpu"] and n >= 4:
        gpus, name = (n - 2, n - 1), "ep2-skewed"
        skewed = ("benchmarks/skewed_step.py", "--devices", "2", "--transport", "p2p")
        skewed = (*skewed, "--json", f"{name}.json")
        lanes.append((Part(name, skewed, gpus, 50, 6, _CUBLAS),))
    return tuple(lanes)


def exchange(
    name: str,
    gpus: tuple[int, ...],
    importance: int,
    shapes: Sequence[tuple[int, int, int]],
    tokens: Sequence[int],
    operations: str = "all",
    options: Sequence[str] = (),
    *,
    clocks: str,
    baselines: str = "off",
) -> Part:
    """`jaxmoe bench` of some shapes, each with some numbers of tokens."""
    sizes = [f"{tokens[0]}x{D}x{K}x{E}" for D, K, E in shapes]
    arguments = ["-m", "jaxmoe", "bench", "--shapes", ",".join(sizes)]
    arguments += ["--tokens", ",".join(map(str, tokens)), "--devices", str(len(gpus))]
    arguments += ["--operations", operations, "--clocks", clocks, "--baselines", baselines]
    num = 5 if operations == "all" else operations.count(",") + 1
    programs = num * (3 if "loop" in clocks else 1)
    implementations = 1 if baselines == "off" else 2 + baselines.count(",")
    each = _SHAPE_SECONDS + implementations * programs * _PROGRAM_SECONDS
    # Baselines are compiled from many more operations of XLA's.
    each += (implementations - 1) * (_SHAPE_SECONDS + 2 * num * _PROGRAM_SECONDS)
    seconds = _EXCHANGE_SECONDS + len(shapes) * len(tokens) * each
    return Part(name, (*arguments, *options, "--json", f"{name}.json"), gpus, seconds, importance)


def _programs(sizes: Sizes, n: int, platform: str) -> list[Step]:
    """The layer, decoding, and a process for each GPU."""
    every = tuple(range(n))
    layer = ("-m", "jaxmoe", "bench", "layer", "--devices", str(n), "--time-limit", "40")
    # Not all combinations: on a GPU `lax.ragged_dot` takes half a second a call.
    own, products = ("p2p", "cuda") if platform == "gpu" else ("cpu", "blocked")
    names = dict.fromkeys(("xla+blocked", f"{own}+{products}", f"xla+{products}"))
    layer += ("--combinations", ",".join(names), "--json", f"ep{n}-layer.json")
    decode = ("benchmarks/decode_loop.py", "--devices", str(n), "--transports")
    end = (*sizes.decode, "--json", f"ep{n}-decode.json")
    steps: list[Step] = [
        ((Part(f"ep{n}-layer", layer, every, 70, 5, _CUBLAS),),),
        ((Part(f"ep{n}-decode", (*decode, own, "xla", *end), every, 45, 5, _CUBLAS),),),
    ]
    if platform == "gpu" and n > 1:
        shape = exchange(
            f"ep{n}-nvshmem", every, 7, sizes.shapes[:1], (sizes.large[0], sizes.small[0]),
            "dispatch,combine,pair", clocks=sizes.clock,
        )  # fmt: skip
        # One process per GPU sees all devices of the launch.
        at = shape.arguments.index("--devices")
        bench = shape.arguments[2:at] + shape.arguments[at + 2 :]
        command = ("-m", "jaxmoe", "launch", "-q", "-n", str(n), "-m", "jaxmoe", *bench)
        part = dataclasses.replace(shape, arguments=command, seconds=shape.seconds + 15)
        steps.append(((part,),))
    return steps


def _whole_table(sizes: Sizes, every: tuple[int, ...], platform: str) -> list[Step]:
    """All tokens for all shapes, either dtype on the wire, all multiprocessors and few."""
    tokens = (*sizes.small, *sizes.large)
    parts = []
    for wire, operations in (("rows", "all"), ("fp8", "dispatch,pair")):
        for sms in ("all", str(FEW_SMS)) if platform == "gpu" else ("all",):
            for D, K, E in sizes.shapes:
                options = ["--wire-dtype", "float8_e4m3fn"] if wire == "fp8" else []
                options += ["--num-sms", sms] if sms != "all" else []
                name = f"ep{len(every)}-table-{D}-{K}-{E}-{wire}-{sms}"
                shape = [(D, K, E)]
                parts.append(
                    exchange(
                        name, every, 10, shape, tokens, operations, options, clocks=sizes.clock
                    )
                )
    return [((part,),) for part in parts]
