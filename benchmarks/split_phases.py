"""Times whole calls against calls in two halves, with a matrix product between.

    python benchmarks/split_phases.py                                    # all GPUs of one process
    python -m jaxmoe launch -n 2 benchmarks/split_phases.py --transport nvshmem

A step is a layer whose experts do nothing and whose shared expert is a SwiGLU of the hidden width
given: dispatch, combine and that product, in a loop of `--steps` steps in one program. "whole":
`dispatch`, `combine`, and XLA puts the product where it likes. "dispatch" and "combine": that call
in two halves, and the product between them. "both": half of the width in each. "work alone" has no
exchange, and with width 0 there is no product. Figures are microseconds a step, wall clock, the
least of `--repeats` runs; routing is uniform and drawn once.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

WAYS = ("whole", "dispatch", "combine", "both", "work alone")
TOKENS = PartitionSpec("expert")


def shared_expert(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def halved(weights: list[jax.Array]) -> list[jax.Array]:
    """A shared expert as two of half its width."""
    if not weights:
        return []
    gate, up, down = weights
    half = gate.shape[1] // 2
    first = [gate[:, :half], up[:, :half], down[:half]]
    return [*first, gate[:, half:], up[:, half:], down[half:]]


def layer(group: jaxmoe.ExpertParallel, way: str, x: Any, ids: Any, weights: Any, shared: Any):
    """One step's result."""
    halves = [shared[:3], shared[3:]]
    works = {"dispatch": [shared, None], "combine": [None, shared], "both": halves}.get(way)
    total = jnp.zeros_like(x)
    if way in ("whole", "work alone") and shared:
        total = shared_expert(x, *shared)
    if way == "work alone":
        return total
    if way == "whole":
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return total + jaxmoe.combine(group, rows, row_weights, plan)
    assert works is not None

    def run(pending: jaxmoe.Pending, work: Any) -> Any:
        return jaxmoe.between(pending, shared_expert, x, *work) if work else (pending, 0)

    if way == "combine":
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
    else:
        pending, first = run(jaxmoe.dispatch_start(group, x, ids, weights), works[0])
        rows, row_weights, plan = jaxmoe.dispatch_done(group, pending)
        total = total + first
    if way == "dispatch":
        return total + jaxmoe.combine(group, rows, row_weights, plan)
    pending, second = run(jaxmoe.combine_start(group, rows, row_weights, plan), works[1])
    return total + jaxmoe.combine_done(group, pending) + second


def make_program(group: jaxmoe.ExpertParallel, way: str, steps: int) -> Any:
    def body(x: Any, ids: Any, weights: Any, *shared: Any) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            y = layer(group, way, carry, ids, weights, list(shared))
            return (carry + y * jnp.bfloat16(2**-8)).astype(carry.dtype), None

        return jax.lax.scan(step, x, length=steps)[0]

    def program(x: Any, ids: Any, weights: Any, *shared: Any) -> Any:
        specs = (TOKENS, TOKENS, TOKENS, *(PartitionSpec() for _ in shared))
        mapped = jax.shard_map(body, mesh=group.mesh, in_specs=specs, out_specs=TOKENS)
        return mapped(x, ids, weights, *shared)

    return jax.jit(program)


def put(group: jaxmoe.ExpertParallel, a: np.ndarray, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(group.mesh, spec)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


def make_operands(group: jaxmoe.ExpertParallel, num_tokens: int, hidden: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    num = group.num_devices * num_tokens
    ids = np.argsort(rng.random((num, group.num_experts)), axis=1)[:, : group.top_k]
    weights = np.full(ids.shape, 1 / group.top_k, np.float32)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    operands = [
        put(group, draw((num, group.dim)).astype(group.dtype), TOKENS),
        put(group, ids.astype(np.int32), TOKENS),
        put(group, weights, TOKENS),
    ]
    for shape in ((group.dim, hidden), (group.dim, hidden), (hidden, group.dim)):
        if hidden:
            matrix = (draw(shape) / shape[0] ** 0.5).astype(group.dtype)
            operands.append(put(group, matrix, PartitionSpec()))
    return operands


def microseconds(program: Any, operands: list[jax.Array], steps: int, repeats: int) -> float:
    jax.block_until_ready(program(*operands))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(*operands))
        times.append((time.perf_counter() - begin) * 1e6 / steps)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 128], help="per device")
    parser.add_argument("--hidden", type=int, nargs="+", default=[0, 512, 2048, 8192])
    parser.add_argument("--dim", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--fp8-wire", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    group = jaxmoe.ExpertParallel(
        mesh,
        num_experts=args.experts,
        top_k=args.top_k,
        dim=args.dim,
        max_tokens=max(args.tokens),
        capacity_factor=1.25,
        transport=args.transport,
        wire_dtype=jnp.float8_e4m3fn if args.fp8_wire else None,
        max_pending=1,
    )
    speaks = jax.process_index() == 0
    if speaks:
        kind = mesh.devices.flat[0].device_kind
        print(f"{mesh.size} x {kind}, {group!r}")
        print(f"calls of up to {group.split_tokens} tokens are split; us a step")
        print(f"{'T':>5} {'hidden':>7}" + "".join(f"{way:>12}" for way in args.ways))
    results = []
    for num_tokens in args.tokens:
        for hidden in args.hidden:
            operands = make_operands(group, num_tokens, hidden)
            times = {}
            for way in args.ways:
                program = make_program(group, way, args.steps)
                given = operands
                if way == "both":
                    given = [*operands[:3], *halved(operands[3:])]
                times[way] = microseconds(program, given, args.steps, args.repeats)
            results.append({"tokens": num_tokens, "hidden": hidden, "us": times})
            if speaks:
                figures = "".join(f"{times[way]:12.1f}" for way in args.ways)
                print(f"{num_tokens:>5} {hidden:>7}{figures}", flush=True)
    if args.json and speaks:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
