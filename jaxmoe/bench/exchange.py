"""Runs the library's exchange and the baselines on one shape: first right, then how fast."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxmoe
from jaxmoe import ops, wire
from jaxmoe.bench import baselines, clocks, events, floors, loads, machine
from jaxmoe.bench.clocks import Operation, Timing
from jaxmoe.bench.floors import Floor, Machine, Traffic

# What a result may differ by, relative to its largest number: sums are rounded to the row dtype
# once for each device and once at the end, in an order that a baseline may choose.
_TOLERANCES = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 1e-5}
_COPIED = ("rows", "row_weights")  # these must be equal
_FEWEST_CALLS = 2
_MOST_EVENTS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """T tokens per device, width D, K choices per token, E experts."""

    tokens: int
    dim: int
    top_k: int
    num_experts: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, for every shape."""

    load: loads.Load
    dtype: str
    transport: str
    baselines: tuple[str, ...]
    operations: tuple[str, ...]
    clocks: tuple[str, ...]
    num_sms: int | None
    capacity_factor: float | str | None
    """A number; None for room for everything; "auto" for just what the routing needs."""
    repeats: int
    iterations: int
    seconds: float
    """About how long a single measured run may take: fewer iterations if they are slow."""
    wire_dtype: str | None = None
    """Of a group; the reference's too."""
    mode: str = "auto"
    """Of a group, as `ExpertParallel` takes it."""


@dataclasses.dataclass
class Result:
    """One operation of one implementation. `status` is ok, or there is no timing, as `note` says:
    skipped, failed or wrong.
    """

    implementation: str
    operation: str
    status: str
    note: str = ""
    loop: Timing | None = None
    events: Timing | None = None

    @property
    def us(self) -> float | None:
        """The device's clock where there is one."""
        timing = self.events or self.loop
        return timing.us if timing else None


@dataclasses.dataclass
class ShapeReport:
    """Everything about one shape."""

    shape: Shape
    load: str
    capacity_factor: float | None
    traffic: Traffic
    floors: dict[str, Floor]
    results: list[Result]
    event_note: str
    wire_dtype: str | None = None

    def own_is_right(self) -> bool:
        """Whether the library's own exchange, which comes first, gave the reference's results."""
        own = self.results[0].implementation
        return all(r.status == "ok" for r in self.results if r.implementation == own)


class Library:
    """The library's own operations on a transport, with the functions of a baseline."""

    def __init__(self, group: jaxmoe.ExpertParallel):
        self._group = group
        self._backend = ops._BACKENDS[group.transport]

    def dispatch(self, x: Any, ids: Any, weights: Any) -> Any:
        return self._backend.dispatch(self._group, _site("dispatch"), x, ids, weights)

    def combine(self, *args: Any) -> Any:
        return self._backend.combine(self._group, _site("combine"), *args)

    def dispatch_grad(self, *args: Any) -> Any:
        return self._backend.dispatch_grad(self._group, _site("dispatch_grad"), *args)

    def combine_grad(self, *args: Any) -> Any:
        return self._backend.combine_grad(self._group, _site("combine_grad"), *args)


def _site(name: str) -> int:
    return zlib.crc32(f"jaxmoe.bench {name}".encode())


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to exchange: a name for the table, and the four functions."""

    name: str
    functions: Any
    compiler_options: dict[str, Any] | None = None


class Exchange:
    """One shape, ready to run: its mesh, groups, inputs and the reference's results."""

    def __init__(
        self, mesh: jax.sharding.Mesh, shape: Shape, settings: Settings, limits: Machine
    ) -> None:
        self.mesh, self.shape, self.settings = mesh, shape, settings
        self.capacity_factor: float | None = None
        self._make_group("xla", None)  # refuses sizes that do not fit, before they are used
        ids = loads.expert_ids(
            settings.load, mesh.size, shape.tokens, shape.top_k, shape.num_experts
        )
        factor = settings.capacity_factor
        if isinstance(factor, str):
            factor = floors.snug_factor(ids, shape.num_experts)
        self.capacity_factor = factor
        self.group = self._make_group(settings.transport, settings.num_sms)
        self.plain = self._make_group("xla", None)
        self.reference = Implementation("xla", Library(self.plain))
        self._programs: dict[str, Any] = {}
        capacity = self.group.capacity(shape.tokens)
        self.traffic = floors.traffic(ids, shape.num_experts, capacity)
        row_bytes = shape.dim * self.group.dtype.itemsize
        sent_bytes = row_bytes if self.group.wire_dtype is None else wire.row_bytes(shape.dim)
        self.floors = {
            name: floors.floor(name, self.traffic, row_bytes, limits, sent_bytes)
            for name in settings.operations
        }
        self.inputs = (
            self._tokens(),
            machine.sharded(mesh, ids),
            machine.sharded(mesh, loads.choice_weights(*ids.shape)),
        )

    def _make_group(self, transport: str, num_sms: int | None) -> jaxmoe.ExpertParallel:
        return jaxmoe.ExpertParallel(
            self.mesh,
            num_experts=self.shape.num_experts,
            top_k=self.shape.top_k,
            dim=self.shape.dim,
            max_tokens=self.shape.tokens,
            capacity_factor=self.capacity_factor,
            dtype=self.settings.dtype,
            wire_dtype=self.settings.wire_dtype,
            mode=self.settings.mode,
            transport=transport,
            num_sms=num_sms,
        )

    def _tokens(self) -> jax.Array:
        """[R, T, D] random, made on the devices."""
        sharding = jax.sharding.NamedSharding(
            self.mesh, jax.sharding.PartitionSpec(self.mesh.axis_names)
        )
        shape = (self.mesh.size, self.shape.tokens, self.shape.dim)

        def draw() -> Any:
            return jax.random.normal(jax.random.key(0), shape, jnp.dtype(self.settings.dtype))

        return jax.jit(draw, out_shardings=sharding)()

    def close(self) -> None:
        self.group.close()
        self.plain.close()

    def implementations(self) -> list[Implementation]:
        """The library's transport first, then the baselines that were asked for."""
        ragged = baselines.Ragged(self.plain)
        flags: list[dict[str, bool] | None] = [None, None]
        if jax.default_backend() == "gpu":  # others do not know the flags
            flags = [{baselines.ONE_SHOT_FLAG: True}, baselines.flags_without_one_shot()]
        found = {
            "xla": self.reference,
            "allgather": Implementation("allgather", baselines.AllGather(self.plain)),
            "ragged": Implementation("ragged", ragged, flags[0]),
            "ragged-nccl": Implementation("ragged-nccl", ragged, flags[1]),
        }
        own = Implementation(self.group.transport, Library(self.group))
        names = [n for n in self.settings.baselines if n != self.group.transport]
        return [own, *(found[name] for name in names)]

    def run(self, progress: Callable[[str], None]) -> ShapeReport:
        """Measure everything. A baseline that fails or is wrong is said to be, not timed."""
        reason = ""
        if "events" in self.settings.clocks:
            reason = events.load(self.group.transport)[1]
        report = ShapeReport(
            self.shape,
            self.settings.load.name,
            self.capacity_factor,
            self.traffic,
            self.floors,
            [],
            reason,
            self.settings.wire_dtype,
        )
        wanted = self._everything(self.reference)(*self.inputs)
        for implementation in self.implementations():
            for result in self._results(implementation, wanted):
                progress(f"{result.implementation} {result.operation}")
                report.results.append(result)
        return report

    def _results(self, implementation: Implementation, wanted: Any) -> Iterator[Result]:
        status, arrays, seconds = "failed", None, 0.0
        try:
            status, note, arrays, seconds = self._check(implementation, wanted)
        except Exception as error:
            note = _sentence(error)
        for name in self.settings.operations:
            result = Result(implementation.name, name, status, note)
            if status == "ok":
                try:
                    self._time(implementation, result, arrays, seconds)
                except Exception as error:
                    result.status, result.note = "failed", _sentence(error)
                    result.loop = result.events = None
            yield result

    def _check(
        self, implementation: Implementation, wanted: Any
    ) -> tuple[str, str, dict[str, Any], float]:
        """Whether the results are right, the arrays they consist of, and seconds of a run."""
        dropped = self.traffic.num_dropped
        if not isinstance(implementation.functions, Library) and self.group.wire_dtype is not None:
            return "skipped", f"sends no {self.group.wire_dtype.name}", {}, 0.0
        if isinstance(implementation.functions, baselines.Ragged):
            reason = baselines.why_not_ragged(self.mesh)
            if dropped:
                reason = f"cannot drop choices, and {dropped} have no room"
            if reason:
                return "skipped", reason, {}, 0.0
        program = self._everything(implementation)
        jax.block_until_ready(program(*self.inputs))
        seconds = clocks.seconds_of(program, self.inputs)
        got = program(*self.inputs)
        worst = ""
        for name in wanted:
            if name == "residual":
                continue
            error, scale = map(float, _difference(got[name], wanted[name]))
            allowed = 0.0 if name in _COPIED else _TOLERANCES[self.settings.dtype] * scale
            if not error <= allowed:
                worst = f"{name} is off by {error:.3g} of {scale:.3g}, {allowed:.3g} is allowed"
        return ("wrong" if worst else "ok"), worst, got, clocks.slowest([seconds])[0]

    def _everything(self, implementation: Implementation) -> Any:
        """A program with every result of an implementation, for `self.inputs`."""
        do = implementation.functions

        def program(x: Any, ids: Any, weights: Any) -> dict[str, Any]:
            rows, row_weights, residual = do.dispatch(x, ids, weights)
            y = do.combine(rows, row_weights, residual)
            d_x, d_weights = do.dispatch_grad(rows, row_weights, residual)
            d_rows, d_row_weights = do.combine_grad(x, rows, row_weights, residual)
            return {
                "rows": rows,
                "row_weights": row_weights,
                "residual": residual,
                "y": y,
                "d_x": d_x,
                "d_weights": d_weights,
                "d_rows": d_rows,
                "d_row_weights": d_row_weights,
            }

        name = implementation.name
        if name not in self._programs:
            self._programs[name] = clocks.compile_on(
                self.mesh, program, self.inputs, implementation.compiler_options
            )
        return self._programs[name]

    def _operation(self, implementation: Implementation, name: str, arrays: Any) -> Operation:
        do = implementation.functions

        def pair(x: Any, ids: Any, weights: Any) -> Any:
            return do.combine(*do.dispatch(x, ids, weights))

        rows = (arrays["rows"], arrays["row_weights"], arrays["residual"])
        function, operands = {
            "dispatch": (do.dispatch, self.inputs),
            "combine": (do.combine, rows),
            "dispatch_grad": (do.dispatch_grad, rows),
            "combine_grad": (do.combine_grad, (self.inputs[0], *rows)),
            "pair": (pair, self.inputs),
        }[name]
        return Operation(name, function, operands, self.mesh, implementation.compiler_options)

    def _time(
        self, implementation: Implementation, result: Result, arrays: Any, seconds: float
    ) -> None:
        operation = self._operation(implementation, result.operation, arrays)
        # `seconds` is that of four operations, so this errs on the side of few.
        calls = math.ceil(2 * self.settings.seconds / max(seconds, 1e-6))
        calls = max(_FEWEST_CALLS, min(calls, self.settings.iterations))
        if "loop" in self.settings.clocks:
            result.loop = clocks.time_in_loop(operation, calls, self.settings.repeats)
        transport = self.group.transport
        if "events" in self.settings.clocks and not events.load(transport)[1]:
            calls = min(calls, _MOST_EVENTS)
            result.events = events.time_with_events(
                operation, transport, calls, self.settings.repeats
            )
        notes = [timing.note for timing in (result.loop, result.events) if timing and timing.note]
        result.note = "; ".join(notes)


@jax.jit
def _difference(got: Any, wanted: Any) -> tuple[Any, Any]:
    """The largest difference, infinite for a NaN, and the largest number."""
    wanted = wanted.astype(jnp.float32)
    apart = jnp.abs(got.astype(jnp.float32) - wanted)
    return jnp.max(jnp.where(jnp.isnan(apart), jnp.inf, apart)), jnp.max(jnp.abs(wanted))


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
