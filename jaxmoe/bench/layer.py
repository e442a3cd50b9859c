"""Times a MoE layer, forward and with its gradients, with each transport and kind of product.

A combination is a transport of the exchange and a backend of the experts' products. The library's
own is what "auto" picks for both. All have the same parameters and tokens; a combination is first
compared with the reference, plain collectives and a loop over blocks of rows, and then timed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe
from jaxmoe import layer, products
from jaxmoe.bench import clocks, dense, events, exchange, floors, loads, phases
from jaxmoe.bench.clocks import Timing
from jaxmoe.bench.layer_inputs import make_inputs
from jaxmoe.layer_config import MoEConfig, param_specs

# What two layers may differ by, relative to the largest number: hidden rows are rounded once more
# or less, and sums are taken in another order.
_TOLERANCES = {"bfloat16": 2.0**-5, "float16": 2.0**-8, "float32": 1e-4}
_FEWEST_CALLS = 2


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """T tokens per device, width D, K choices per token, E experts of hidden width F."""

    tokens: int
    dim: int
    top_k: int
    num_experts: int
    hidden_dim: int


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What to run, for every shape."""

    load: loads.Load
    dtype: str
    transport: str
    combinations: tuple[str, ...]
    """Names, or empty for the library's own and plain collectives with each backend."""
    breakdown: str
    """"own", "all" or "off": which combinations are taken apart."""
    num_sms: int | None
    capacity_factor: float | str | None
    """A number; None for room for everything; "auto" for just what the routing needs."""
    repeats: int
    iterations: int
    seconds: float
    """About how long a measured run may take."""
    limit: float
    """Seconds that a combination may take in all, compilation included."""
    wire_dtype: str | None = None
    mode: str = "auto"


@dataclasses.dataclass
class LayerResult:
    """A combination's times. `status` is ok, or there are none, as `note` says: skipped, failed,
    wrong or late.
    """

    transport: str
    backend: str
    status: str
    note: str = ""
    forward: Timing | None = None
    both: Timing | None = None
    """Forward and backward."""
    phases: dict[str, phases.PhaseTiming] = dataclasses.field(default_factory=dict)
    phase_note: str = ""

    @property
    def name(self) -> str:
        return f"{self.transport}+{self.backend}"

    @property
    def is_plain(self) -> bool:
        """Whether it has none of the library's custom calls, for exchange or products."""
        return self.transport == "xla" and self.backend != "cuda"


@dataclasses.dataclass
class LayerReport:
    """Everything about one shape."""

    shape: LayerShape
    load: str
    dtype: str
    capacity_factor: float | None
    traffic: floors.Traffic
    dense: dict[tuple[int, int, int], Timing]
    """Products [m, k] x [k, n] with one matrix: as many rows as the layer's, and a cube."""
    own: str
    results: list[LayerResult]
    running: str = ""
    """A combination that took too long, and may still run."""

    @property
    def rows(self) -> int:
        """Of the device that has most."""
        return int(self.traffic.num_rows.max())

    def own_is_right(self) -> bool:
        """Whether the library's own layer ran and gave the reference's results."""
        return all(r.status == "ok" for r in self.results if r.name == self.own)


class LayerBench:
    """One shape, ready to run: its mesh, groups, parameters, tokens and the reference's results."""

    def __init__(self, mesh: jax.sharding.Mesh, shape: LayerShape, settings: LayerSettings) -> None:
        self.mesh, self.shape, self.settings = mesh, shape, settings
        self.capacity_factor: float | None = None
        self._groups: dict[str, jaxmoe.ExpertParallel] = {}
        self._wanted: Any = None
        config = self._config("xla", "blocked")
        self.params, self.x, self.d_y = make_inputs(config, shape.tokens, settings.load)
        ids = self._choices(config)
        factor = settings.capacity_factor
        if isinstance(factor, str):
            factor = floors.snug_factor(ids, shape.num_experts)
        self.close()
        self.capacity_factor = factor
        self._group(settings.transport)  # refuses what it cannot serve, before anything slow
        capacity = self._group("xla").capacity(shape.tokens)
        self.traffic = floors.traffic(ids, shape.num_experts, capacity)

    def _group(self, transport: str) -> jaxmoe.ExpertParallel:
        """The group of a transport; it stays open for the combinations that share it."""
        if transport not in self._groups:
            shape, settings = self.shape, self.settings
            group = jaxmoe.ExpertParallel(
                self.mesh,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                dim=shape.dim,
                max_tokens=shape.tokens,
                capacity_factor=self.capacity_factor,
                dtype=settings.dtype,
                wire_dtype=settings.wire_dtype,
                mode=settings.mode,
                transport=transport,
                num_sms=None if transport in ("cpu", "xla") else settings.num_sms,
            )
            self._groups[transport] = self._groups[group.transport] = group
        return self._groups[transport]

    def _config(self, transport: str, backend: str) -> MoEConfig:
        return MoEConfig(
            self._group(transport), self.shape.hidden_dim, site="bench", backend=backend
        )

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._groups = {}

    def _choices(self, config: MoEConfig) -> np.ndarray:
        """[R, T, K] experts of all tokens, on the host of every process."""

        def choose(x: Any, router: Any) -> Any:
            return layer._route(config, router, x, None, None, None, None).expert_ids

        ids = jax.jit(choose)(self.x, self.params["router"])
        everywhere = np.asarray(multihost_utils.process_allgather(ids, tiled=True))
        return everywhere.reshape(self.mesh.size, self.shape.tokens, self.shape.top_k)

    def own(self) -> tuple[str, str]:
        """Transport and backend that "auto" picks."""
        device = self.mesh.devices.flat[0]
        widths = (self.shape.dim, self.shape.hidden_dim)
        choice = products.choose_backend("auto", self.settings.dtype, widths, device)
        return self._group(self.settings.transport).transport, choice.backend

    def combinations(self) -> list[tuple[str, str]]:
        """The reference first; what may take longest to compile last."""
        own = self.own()
        if self.settings.combinations:
            named = [tuple(name.split("+")) for name in self.settings.combinations]
            return [(t, b) for t, b in named]
        backends = dict.fromkeys((own[1], "cuda", "tokamax", "ragged_dot"))
        plain = [("xla", b) for b in backends]
        return list(dict.fromkeys([("xla", "blocked"), own, *plain]))

    def _sizes(self) -> tuple[int, int, int]:
        """The first product's: rows of the device that has most, D and 2 F."""
        rows = int(self.traffic.num_rows.max())
        return rows, self.shape.dim, 2 * self.shape.hidden_dim

    def num_steps(self) -> int:
        """How often `run` tells its progress, if all goes well."""
        runs = [c for c in self.combinations() if not self._why_not(c[1])]
        wanted, own = self.settings.breakdown, self.own()
        parts = [c for c in runs if wanted == "all" or (wanted == "own" and c == own)]
        return 1 + 3 * len(runs) + len(parts)

    def run(self, progress: Callable[[str], None]) -> LayerReport:
        """Measure everything. A combination that fails or is wrong is said to be, not timed."""
        report = LayerReport(
            self.shape,
            self.settings.load.name,
            self.settings.dtype,
            self.capacity_factor,
            self.traffic,
            dense.time_products(self.mesh, self._sizes(), self.settings.dtype, self._time),
            "+".join(self.own()),
            [],
        )
        progress("dense products")
        for transport, backend in self.combinations():
            result = LayerResult(transport, backend, "skipped")
            report.results.append(result)
            if report.running:
                result.note = f"{report.running} may still run"
                continue
            result.note = self._why_not(backend)
            if result.note:
                continue
            progress(f"{result.name}: compile and compare")
            if not _within(self.settings.limit, functools.partial(self._measure, result, progress)):
                result.status = "late"
                result.note = f"took more than {self.settings.limit:g} s"
                report.running = result.name
        return report

    def _measure(self, result: LayerResult, progress: Callable[[str], None]) -> None:
        try:
            config = self._config(result.transport, result.backend)
            self._time_layer(config, result, progress)
            wanted = self.settings.breakdown
            is_own = (result.transport, result.backend) == self.own()
            if result.status == "ok" and (wanted == "all" or (wanted == "own" and is_own)):
                progress(f"{result.name}: its parts")
                self._time_phases(config, result)
        except Exception as error:
            result.status, result.note = "failed", exchange._sentence(error)
            result.forward = result.both = None

    def _why_not(self, backend: str) -> str:
        """Why a backend cannot run here; empty if it can."""
        device, widths = self.mesh.devices.flat[0], (self.shape.dim, self.shape.hidden_dim)
        try:
            products.choose_backend(backend, self.settings.dtype, widths, device)
        except RuntimeError as error:
            return str(error)
        return ""

    def _time_layer(
        self, config: MoEConfig, result: LayerResult, progress: Callable[[str], None]
    ) -> None:
        """Gradients may fail, for want of memory say; then there is still the forward pass."""
        operands = (self.params, self.x, self.d_y)
        try:
            program = self._compile(functools.partial(step, config), operands)
            result.status, result.note = self._check(_sample(config, program(*operands)))
            if result.status == "ok":
                progress(f"{result.name}: forward and backward")
                result.both = self._time(program, operands)
            del program
        except Exception as error:
            result.status, result.note = "ok", f"no gradients: {exchange._sentence(error)}"
        if result.status != "ok":
            return
        program = self._compile(functools.partial(forward, config), operands[:2])
        status, note = self._check({"y": program(*operands[:2])})
        if status != "ok":
            result.status, result.note, result.both = status, note, None
            return
        progress(f"{result.name}: forward")
        result.forward = self._time(program, operands[:2])

    def _compile(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
        """Raises RuntimeError if the devices have too little memory to run it."""
        program = jax.jit(function).lower(*operands).compile()
        used, stats = program.memory_analysis(), self.mesh.local_devices[0].memory_stats()
        if used is None or not stats or "bytes_limit" not in stats:
            return program
        wanted = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
        if wanted > stats["bytes_limit"]:
            have = stats["bytes_limit"] / 1e9
            raise RuntimeError(f"needs {wanted / 1e9:.1f} GB of a device's memory, of {have:.1f}")
        return program

    def _time(self, program: Any, operands: Any) -> Timing:
        jax.block_until_ready(program(*operands))
        seconds = clocks.slowest([clocks.seconds_of(program, operands)])[0]
        calls = math.ceil(self.settings.seconds / max(seconds, 1e-6))
        calls = max(_FEWEST_CALLS, min(calls, self.settings.iterations))
        return clocks.time_calls(program, operands, calls, self.settings.repeats)

    def _check(self, got: dict[str, Any]) -> tuple[str, str]:
        """Compares with what the first combination gave."""
        if self._wanted is None:
            self._wanted = got
        allowed = _TOLERANCES[self.settings.dtype]
        for name in got:
            error, scale = map(float, exchange._difference(got[name], self._wanted[name]))
            if not error <= allowed * scale:
                note = f"{name} is off by {error:.3g} of {scale:.3g}, "
                return "wrong", f"{note}{allowed * scale:.3g} is allowed"
        return "ok", ""

    def _time_phases(self, config: MoEConfig, result: LayerResult) -> None:
        block = layer._block_rows(config.group, self.shape.tokens)
        parts = phases.phases(config, block, result.backend)
        inputs = self._per_device()
        reason = events.load(result.transport)[1]
        if reason:
            result.phase_note = f"each in a program of its own ({reason})"
            calls, repeats = _FEWEST_CALLS, self.settings.repeats
            times = phases.time_alone(parts, self.mesh, inputs, calls, repeats)
        else:
            result.phase_note = "one program, CUDA events at their borders"
            times = phases.time_together(
                parts, self.mesh, inputs, result.transport, self.settings.repeats
            )
        result.phases = dict(times)

    def _per_device(self) -> dict[str, Any]:
        """The inputs as [R, ...]; the router is copied, the others are seen as they lie."""
        num = self.mesh.size
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

        def split(a: Any) -> Any:
            return a.reshape(num, a.shape[0] // num, *a.shape[1:])

        def arrange(params: Any, x: Any, d_y: Any) -> dict[str, Any]:
            router = jnp.broadcast_to(params["router"], (num, *params["router"].shape))
            rest = {name: split(params[name]) for name in phases.WEIGHTS}
            return {"x": split(x), "d_y": split(d_y), "router": router, **rest}

        program = jax.jit(arrange, out_shardings=sharding)
        return program(self.params, self.x, self.d_y)


def forward(config: MoEConfig, params: Any, x: Any) -> jax.Array:
    return layer.moe_layer(config, params, x)[0]


def step(config: MoEConfig, params: Any, x: Any, d_y: Any) -> dict[str, Any]:
    """The layer's output and all its gradients, for the output's gradient `d_y`."""
    y, vjp = jax.vjp(functools.partial(forward, config), params, x)
    d_params, d_x = vjp(d_y)
    return {"y": y, "d_x": d_x, **{f"d_{name}": d for name, d in d_params.items()}}


def _sample(config: MoEConfig, results: dict[str, Any]) -> dict[str, Any]:
    """All of y and of the gradients of x and the router, and one expert's of each device."""
    sharded = [f"d_{name}" for name in phases.WEIGHTS]
    specs = {f"d_{name}": PartitionSpec(*s.sharding) for name, s in param_specs(config).items()}
    mesh = config.group.mesh
    first = jax.shard_map(
        lambda some: jax.tree.map(lambda a: a[:1], some),
        mesh=mesh,
        in_specs=({name: specs[name] for name in sharded},),
        out_specs={name: specs[name] for name in sharded},
    )
    some = jax.jit(first)({name: results[name] for name in sharded})
    return {name: some.get(name, result) for name, result in results.items()}


def _within(seconds: float, function: Callable[[], None]) -> bool:
    """Calls it in a thread of its own; False if it is not done after `seconds`, and goes on.

    A compiler cannot be interrupted: whoever gets False should end the process (`os._exit`).
    """
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def phase_names(results: list[LayerResult]) -> Iterator[str]:
    """Of the phases that some result has, in their order."""
    for name in (*phases.FORWARD, *phases.BACKWARD):
        if any(name in result.phases for result in results):
            yield name
