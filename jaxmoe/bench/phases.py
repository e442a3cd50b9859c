"""A MoE layer's step taken apart: what it does one after the other, forward and backward.

The parts are those of `jaxmoe.layer` and the backends' own products, each a function of one
device's arrays. Two ways to time them: all in one program, with CUDA events in between, as they
follow on each other in a layer; or, where there are no events, each in a program of its own.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxmoe
from jaxmoe import layer, products
from jaxmoe.bench import clocks, events
from jaxmoe.bench.clocks import Timing
from jaxmoe.layer_config import MoEConfig
from jaxmoe.products import cuda

F32 = jnp.float32
WEIGHTS = ("gate", "up", "down")
FORWARD = ("route", "dispatch", "gate-up", "down", "combine")
BACKWARD = (
    "combine grad",
    "down dx",
    "down dw",
    "SwiGLU grad",
    "gate-up dx",
    "gate-up dw",
    "dispatch grad",
    "route grad",
)
# Multiples of rows * D * F that the products of a phase count as operations.
OPERATIONS = {
    "gate-up": 4,
    "down": 2,
    "down dx": 2,
    "down dw": 2,
    "gate-up dx": 4,
    "gate-up dw": 4,
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the step: it reads arrays by name, the weights among them, and writes others."""

    name: str
    function: Callable[..., tuple[Any, ...]]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PhaseTiming(Timing):
    """Of the slowest device; `least_us` is that of the fastest.

    An exchange ends on no device before it has begun on all: what the device waits that comes
    first, the other does not, so that the exchange itself takes `least_us`.
    """

    least_us: float | None = None


def phases(config: MoEConfig, block_rows: int, backend: str) -> list[Phase]:
    """A training step of the layer for inputs "x", "d_y", "router", "gate", "up" and "down"."""
    group, module = config.group, products._module((backend, block_rows))

    def route(x: Any, router: Any) -> Any:
        def weights_of(x: Any, router: Any) -> Any:
            routing = layer._route(config, router, x, None, None, None, None)
            return routing.weights, routing.expert_ids

        weights, vjp, ids = jax.vjp(weights_of, x, router, has_aux=True)
        return weights, ids, vjp

    def dispatch(x: Any, ids: Any, weights: Any) -> Any:
        def rows_of(x: Any, weights: Any) -> Any:
            rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights, site="bench")
            return (rows, row_weights), plan

        (rows, row_weights), vjp, plan = jax.vjp(rows_of, x, weights, has_aux=True)
        return rows, row_weights, plan, vjp

    def gate_up(rows: Any, plan: Any, gate: Any, up: Any) -> Any:
        if backend == "cuda":
            return tuple(cuda.swiglu(rows, gate, up, plan.group_sizes, save=True))
        a, b = (module.forward(rows, w, plan.group_sizes) for w in (gate, up))
        return _hidden(a, b), a, b

    def combine(expert_rows: Any, row_weights: Any, plan: Any) -> Any:
        def sums_of(expert_rows: Any, row_weights: Any) -> Any:
            return jaxmoe.combine(group, expert_rows, row_weights, plan, site="bench")

        return jax.vjp(sums_of, expert_rows, row_weights)

    def gate_up_dx(d_a: Any, d_b: Any, plan: Any, gate: Any, up: Any) -> Any:
        sizes = plan.group_sizes
        if backend == "cuda":
            return (cuda.input_grad_of_two(d_a, gate, d_b, up, sizes),)
        return (module.input_grad(d_a, gate, sizes) + module.input_grad(d_b, up, sizes),)

    def gate_up_dw(rows: Any, d_a: Any, d_b: Any, plan: Any) -> Any:
        return tuple(module.weight_grad(rows, d, plan.group_sizes) for d in (d_a, d_b))

    def by_sizes(function: Any) -> Any:
        return lambda a, b, plan: (function(a, b, plan.group_sizes),)

    def backward(d: Any, vjp: Any) -> Any:
        return vjp(d)

    return [
        Phase("route", route, ("x", "router"), ("weights", "ids", "route_vjp")),
        Phase("dispatch", dispatch, ("x", "ids", "weights"),
              ("rows", "row_weights", "plan", "dispatch_vjp")),
        Phase("gate-up", gate_up, ("rows", "plan", "gate", "up"), ("hidden", "a", "b")),
        Phase("down", by_sizes(module.forward), ("hidden", "down", "plan"), ("expert_rows",)),
        Phase("combine", combine, ("expert_rows", "row_weights", "plan"), ("y", "combine_vjp")),
        Phase("combine grad", backward, ("d_y", "combine_vjp"), ("d_expert_rows", "d_row_weights")),
        Phase("down dx", by_sizes(module.input_grad), ("d_expert_rows", "down", "plan"),
              ("d_hidden",)),
        Phase("down dw", by_sizes(module.weight_grad), ("hidden", "d_expert_rows", "plan"),
              ("d_down",)),
        Phase("SwiGLU grad", lambda a, b, d: jax.vjp(_hidden, a, b)[1](d), ("a", "b", "d_hidden"),
              ("d_a", "d_b")),
        Phase("gate-up dx", gate_up_dx, ("d_a", "d_b", "plan", "gate", "up"), ("d_rows",)),
        Phase("gate-up dw", gate_up_dw, ("rows", "d_a", "d_b", "plan"), ("d_gate", "d_up")),
        Phase("dispatch grad", lambda d, w, vjp: vjp((d, w)),
              ("d_rows", "d_row_weights", "dispatch_vjp"), ("d_x", "d_weights")),
        Phase("route grad", backward, ("d_weights", "route_vjp"), ("d_x_of_router", "d_router")),
    ]  # fmt: skip


def _hidden(a: Any, b: Any) -> jax.Array:
    return (jax.nn.silu(a.astype(F32)) * b.astype(F32)).astype(a.dtype)


def time_alone(
    parts: list[Phase], mesh: jax.sharding.Mesh, inputs: dict[str, Any], calls: int, repeats: int
) -> Iterator[tuple[str, PhaseTiming]]:
    """Each phase by itself, for inputs [R, ...]: calls from Python, one after the other."""
    state = dict(inputs)
    for phase in parts:
        operands = tuple(state[name] for name in phase.reads)
        program = clocks.compile_on(mesh, lambda *a, f=phase.function: tuple(f(*a)), operands)
        state.update(zip(phase.writes, program(*operands), strict=True))
        timing = clocks.time_calls(program, operands, calls, repeats)
        yield phase.name, PhaseTiming(**vars(timing))


def time_together(
    parts: list[Phase],
    mesh: jax.sharding.Mesh,
    inputs: dict[str, Any],
    transport: str,
    repeats: int,
) -> Iterator[tuple[str, PhaseTiming]]:
    """All phases of one program, for inputs [R, ...]: CUDA events at their borders."""
    names = tuple(inputs)
    target = events.target(transport)

    def step(*arrays: Any) -> Any:
        return chain(parts, target, dict(zip(names, arrays, strict=True)))

    program = clocks.compile_on(mesh, step, tuple(inputs.values()))
    operands = tuple(inputs.values())
    times = events.intervals(mesh, transport, len(parts), lambda: program(*operands), repeats)
    for phase, repeated in zip(parts, times, strict=True):
        most = clocks.summarize(clocks.slowest([max(us) for us in repeated]), 1)
        least = clocks.slowest([-min(us) for us in repeated])
        yield phase.name, PhaseTiming(**vars(most), least_us=-statistics.median(least))


def chain(parts: list[Phase], target: str, state: dict[str, Any]) -> Any:
    """One device's part of that program, which returns all that the last phases wrote.

    What a phase reads goes through the record before it, and what it wrote into the one behind it.
    Weights do not: they are arguments of the program, which XLA would copy for that.
    """
    fixed = ("router", *WEIGHTS)
    written: dict[str, Any] = {}
    for slot, phase in enumerate(parts):
        reads = [name for name in phase.reads if name not in fixed]
        if slot == 0:  # arguments are copied before the first event
            reads = [name for name in state if name not in fixed]
        through = {name: state[name] for name in reads}
        state |= events.record(target, slot, through, written)
        results = phase.function(*(state[name] for name in phase.reads))
        written = dict(zip(phase.writes, results, strict=True))
        state |= written
    last = {"y": state["y"]}
    state |= events.record(target, len(parts), last, written)
    return {name: state[name] for name in ("y", "d_x", "d_gate", "d_up", "d_down", "d_router")}
