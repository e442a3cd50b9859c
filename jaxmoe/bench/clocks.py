"""The wall clock: a jit that calls an operation many times in a `lax.scan`, less an empty loop.

A call from Python costs more than an exchange takes, so the calls have to lie inside one program;
and XLA must neither move them out of the loop nor drop any part of them. Hence every step changes
one word of each operand by something that the last step's result decides (and that is always
zero), in place, and all results are carried to the next step and returned. The empty loop does the
same to the same arrays, but for the calls.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

# The first runs of a program load kernels and capture CUDA graphs.
WARM_UPS = {"gpu": 3}
_COLLECTIVES = r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)"
_HLO_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int32": "s32"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something to time: a function of one device's arrays, and arrays [R, ...] to call it with."""

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    mesh: jax.sharding.Mesh
    compiler_options: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of a call, on the slowest device."""

    us: float
    spread_us: float
    """Half the distance between the first and the third quartile of the repeats."""
    calls: int
    all_us: tuple[float, ...]
    note: str = ""


def summarize(us: list[float], calls: int, note: str = "") -> Timing:
    quarter = statistics.quantiles(us, n=4) if len(us) > 1 else [us[0]] * 3
    return Timing(statistics.median(us), (quarter[2] - quarter[0]) / 2, calls, tuple(us), note)


def slowest(values: list[float]) -> list[float]:
    """Each value's maximum over the processes, which all have to ask."""
    if jax.process_count() == 1:
        return values
    everywhere = multihost_utils.process_allgather(np.asarray(values))
    return [float(v) for v in np.asarray(everywhere).max(axis=0)]


def compile_on(
    mesh: jax.sharding.Mesh,
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    compiler_options: dict[str, Any] | None = None,
) -> Any:
    """Compile `function` of each device's arrays for operands [R, ...]; results get the R too."""
    spec = PartitionSpec(mesh.axis_names)

    def shard(*args: Any) -> Any:
        out = function(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    mapped = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped, compiler_options=compiler_options).lower(*operands).compile()


def time_in_loop(operation: Operation, calls: int, repeats: int) -> Timing:
    """Time `calls` calls per run. Raises RuntimeError if XLA took them out of the loop."""
    loop, empty = (compile_loop(operation, calls, empty) for empty in (False, True))
    note = check_loop(operation, loop.as_text(), empty.as_text())
    for program in (loop, empty):
        warm_up(program, operation)
    pairs = [
        [seconds_of(program, operation.operands) for program in (loop, empty)]
        for _ in range(repeats)
    ]
    nothing = statistics.median(slowest([without for _, without in pairs]))
    us = [1e6 * (t - nothing) / calls for t in slowest([filled for filled, _ in pairs])]
    return summarize(us, calls, note)


def time_calls(program: Any, operands: tuple[Any, ...], calls: int, repeats: int) -> Timing:
    """Time calls from Python, each made while the one before runs; for calls that take long.

    The host needs some 70 µs to make one, which shows where the devices are faster than that.
    """
    jax.block_until_ready(program(*operands))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        before = None
        for _ in range(calls):
            now = program(*operands)
            jax.block_until_ready(before)  # results are large: there are two at most
            before = now
        jax.block_until_ready(before)
        seconds.append(time.perf_counter() - start)
    return summarize([1e6 * s / calls for s in slowest(seconds)], calls)


def warm_up(program: Any, operation: Operation) -> None:
    for _ in range(WARM_UPS.get(jax.default_backend(), 1)):
        jax.block_until_ready(program(*operation.operands))


def seconds_of(program: Any, operands: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*operands))
    return time.perf_counter() - start


def compile_loop(operation: Operation, calls: int, empty: bool = False) -> Any:
    """The program of the module's docstring: one call, and then a loop of `calls` calls or none."""

    def program(*operands: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            unlikely, operands, results = carry
            operands = nudge(operands, unlikely)
            if not empty:
                results = operation.function(*operands)
            return (_begins_with_nan(results), operands, results), None

        first = operation.function(*operands)
        start = (_begins_with_nan(first), operands, first)
        (_, operands, results), _ = lax.scan(step, start, None, length=calls)
        # All results, so that none is dropped; a word of the operands, so that both loops nudge.
        return results, [jnp.ravel(_word(a)) for a in jax.tree.leaves(operands)]

    return compile_on(operation.mesh, program, operation.operands, operation.compiler_options)


def nudge(tree: Any, unlikely: Any) -> Any:
    """Write one word of each array in place: what it was, as only `unlikely` being false tells."""

    def one(a: Any) -> Any:
        word = _word(a)
        changed = jnp.where(unlikely, jnp.ones_like(word), word)
        return lax.dynamic_update_slice(a, changed, (0,) * a.ndim)

    return jax.tree.map(one, tree)


def _word(a: Any) -> Any:
    return lax.slice(a, (0,) * a.ndim, (1,) * a.ndim)


def _begins_with_nan(results: Any) -> Any:
    """False, which can only be known when the first of the results has been computed."""
    return jnp.isnan(_word(jax.tree.leaves(results)[0]).reshape(()))


def check_loop(operation: Operation, loop: str, empty: str) -> str:
    """A sentence about what the loop does beside the calls, if anything; from compiled programs.

    Raises RuntimeError unless there is a call in every step.
    """
    # A loop of a few steps may have been unrolled.
    lines = list(loop_lines(loop)) if " while(" in loop else loop.splitlines()
    calls = [line for line in lines if "jaxmoe_" in line or re.search(_COLLECTIVES, line)]
    if operation.mesh.size > 1 and not calls:
        raise RuntimeError(
            f"XLA moved {operation.name} out of the loop that times it, whose time would be that "
            "of nothing. Please report this with the version of jaxlib."
        )
    num, num_empty = (
        len(copies_of(operation.operands, some)) for some in (lines, loop_lines(empty))
    )
    if num <= num_empty:
        return ""
    return f"loop: with {num - num_empty} copies of an operand that XLA makes"


def loop_lines(hlo: str) -> Iterator[str]:
    """The instructions of all while loops' bodies, and of what these call."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        opening = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opening:
            lines = computations.setdefault(opening[1], [])
        else:
            lines.append(line)
    called = re.findall(r" while\(.*body=%?([\w.\-]+)", hlo)
    seen: set[str] = set()
    while called:
        name = called.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for line in computations[name]:
            yield line
            for names in re.findall(r"(?:calls|to_apply|body|computations)=\{?([^}\s]*)", line):
                called += re.findall(r"[\w.\-]+", names)


def copies_of(operands: Any, lines: Iterable[str]) -> list[str]:
    """Those HLO instructions that copy an array like the largest of the operands [R, ...]."""
    leaves = jax.tree.leaves(operands)
    most = max(a.nbytes for a in leaves)
    shapes = {
        f"{_HLO_DTYPES[a.dtype.name]}[{','.join(map(str, a.shape[1:]))}]"
        for a in leaves
        if a.nbytes == most
    }
    copies = re.compile(r"= \(?(\w+\[[\d,]*\]).* copy(?:-start)?\(")
    found = ((line, copies.search(line)) for line in lines)
    return [line for line, match in found if match and match[1] in shapes]
