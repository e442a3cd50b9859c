"""Time of a training step of one MoE layer under skewed routing, with replicas and without.

    python benchmarks/skewed_step.py                                     # 8 virtual CPU devices
    python benchmarks/skewed_step.py --devices 2 --transport p2p         # 2 GPUs of one process
    python -m jaxmoe launch -n 2 benchmarks/skewed_step.py --transport nvshmem
    python benchmarks/skewed_step.py --what lookup --lookup-tokens 128 4096

A step is the layer's output and the gradients of its tokens and weights, or with --forward the
output. Experts are chosen with a probability of 1 / rank^S, the busiest ones on the first device,
which is the worst that an unlucky order can be: "uniform" is S = 0; "skewed" leaves every expert in
its place; "moved" has `place` put them elsewhere, one slot each; "replicas" gives busy ones the
redundant slots, too. The placement is made from the load of other tokens than those timed. Nothing
is ever dropped.

"lookup" times dispatch to the slots that `choose_replicas` looks up, and to the same slots given.

All programs run in turn, so that whatever else the machine does touches them alike; a figure is the
median of the rounds. On CPUs a device computes on one thread (--threads lets it take all).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import runtime


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a platform takes where the command line says nothing."""

    tokens: int
    dim: int
    hidden_dim: int
    experts: int
    redundant: int
    top_k: int
    zipf: float
    dtype: str
    lookup_dim: int
    lookup_experts: int
    lookup_redundant: int
    lookup_top_k: int
    calls: int
    lookup_calls: int
    rounds: int


SIZES = {
    "cpu": Sizes(2048, 128, 512, 32, 16, 2, 2.0, "float32", 256, 256, 32, 8, 2, 2, 9),
    "gpu": Sizes(16384, 2048, 1024, 64, 4, 8, 1.5, "bfloat16", 7168, 256, 32, 8, 10, 300, 9),
}
SCENARIOS = ("uniform", "skewed", "moved", "replicas")


class Bench:
    """The devices and sizes, and the programs that are timed in turn."""

    def __init__(self, args: argparse.Namespace) -> None:
        import jax
        import numpy as np

        count = args.devices or len(jax.devices())
        if count > len(jax.devices()):
            raise SystemExit(f"skewed_step: --devices {count}, but there are {len(jax.devices())}.")
        self.mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("expert",))
        sizes = SIZES.get(jax.default_backend(), SIZES["cpu"])
        given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Sizes)}
        self.sizes = dataclasses.replace(sizes, **{k: v for k, v in given.items() if v is not None})
        self.transport = args.transport
        self.num_devices = count

    def group(self, slots: int, *, tokens: int, dim: int, top_k: int) -> Any:
        import jaxmoe

        return jaxmoe.ExpertParallel(
            self.mesh,
            num_experts=slots,
            top_k=top_k,
            dim=dim,
            max_tokens=tokens,
            dtype=self.sizes.dtype,
            transport=self.transport,
        )

    def on_devices(self, make: Any) -> Any:
        """The arrays [R, ...] of `make(device)`, made on the devices."""
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        sharding = NamedSharding(self.mesh, PartitionSpec("expert"))
        everywhere = jax.vmap(make)
        devices = jnp.arange(self.num_devices, dtype=jnp.int32)
        return jax.jit(lambda: everywhere(devices), out_shardings=sharding)()

    def in_turn(self, operations: dict[str, Any], calls: int) -> dict[str, list[float]]:
        """Microseconds of a call of each operation, of `calls` in a run, round by round."""
        from jaxmoe.bench import clocks

        programs = {}
        for name, operation in operations.items():
            programs[name] = clocks.compile_loop(operation, calls)
            clocks.warm_up(programs[name], operation)
        print("skewed_step: compiled, timing ...", file=sys.stderr, flush=True)
        times: dict[str, list[float]] = {name: [] for name in operations}
        for _ in range(self.sizes.rounds):
            for name, program in programs.items():
                seconds = clocks.seconds_of(program, operations[name].operands)
                # One call before the loop of `calls`.
                times[name].append(1e6 * clocks.slowest([seconds])[0] / (calls + 1))
        return times


def draw_logits(key: Any, sizes: Sizes, zipf: float) -> Any:
    """[T, E] logits whose top K are experts drawn without return, by the Gumbel trick."""
    import jax
    import jax.numpy as jnp

    rank = jnp.arange(1, sizes.experts + 1, dtype=jnp.float32)
    noise = jax.random.gumbel(key, (sizes.tokens, sizes.experts), jnp.float32)
    return noise - zipf * jnp.log(rank)


def make_step(bench: Bench, scenario: str, forward: bool) -> tuple[Any, Any]:
    """The operation of a scenario, and a function of its operands: output and rows per device."""
    import jax
    import jax.numpy as jnp

    from jaxmoe.bench.clocks import Operation
    from jaxmoe.layer import moe_layer
    from jaxmoe.layer_config import MoEConfig

    s = bench.sizes
    zipf = 0.0 if scenario == "uniform" else s.zipf
    slots = s.experts + (s.redundant if scenario == "replicas" else 0)
    placement = make_placement(bench, zipf, slots) if scenario in ("moved", "replicas") else None
    group = bench.group(slots, tokens=s.tokens, dim=s.dim, top_k=s.top_k)
    config = MoEConfig(group, s.hidden_dim, num_experts=None if placement is None else s.experts)
    held = jnp.arange(slots) if placement is None else jnp.asarray(placement.slot_experts)
    dtype, local = jnp.dtype(s.dtype), slots // bench.num_devices

    def make(device: Any) -> Any:
        """This device's tokens and weights; the first E features of a token are its logits."""
        key = jax.random.fold_in(jax.random.key(0), device)
        tokens = jax.random.normal(key, (s.tokens, s.dim), jnp.float32)
        logits = draw_logits(jax.random.fold_in(key, 1), s, zipf)
        tokens = tokens.at[:, : s.experts].set(logits)

        def expert(e: Any) -> dict[str, Any]:
            shapes = {"gate": (s.dim, s.hidden_dim), "up": (s.dim, s.hidden_dim)}
            shapes["down"] = (s.hidden_dim, s.dim)
            key = jax.random.fold_in(jax.random.key(1), e)
            return {
                name: jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
                / math.sqrt(shape[0])
                for i, (name, shape) in enumerate(shapes.items())
            }

        mine = jax.lax.dynamic_slice_in_dim(held, device * local, local)
        router = jnp.eye(s.dim, s.experts, dtype=jnp.float32)
        return tokens.astype(dtype), {"router": router, **jax.vmap(expert)(mine)}, placement

    def output(x: Any, params: Any, placement: Any) -> Any:
        y, stats = moe_layer(config, params, x, placement=placement)
        return y, stats.rows_per_device

    def step(x: Any, params: Any, placement: Any) -> Any:
        if forward:
            return output(x, params, placement)[0]

        def loss(x: Any, params: Any) -> Any:
            y = output(x, params, placement)[0].astype(jnp.float32)
            return jnp.sum(y * y)

        return jax.value_and_grad(loss, argnums=(0, 1))(x, params)

    operands = bench.on_devices(make)
    return Operation(scenario, step, operands, bench.mesh), output


def make_placement(bench: Bench, zipf: float, slots: int) -> Any:
    """From the load of tokens that are not timed, equal in all processes."""
    import jax
    import numpy as np

    from jaxmoe import balance

    s = bench.sizes
    draw = functools.partial(draw_logits, sizes=s, zipf=zipf)
    logits = jax.vmap(draw)(jax.random.split(jax.random.key(7), bench.num_devices))
    chosen = np.asarray(jax.lax.top_k(logits, s.top_k)[1])
    load = np.bincount(chosen.ravel(), minlength=s.experts)
    count = bench.num_devices
    return balance.place(load, num_devices=count, num_replicas=slots, distinct=True)


def measure_steps(bench: Bench, forward: bool) -> dict[str, dict[str, Any]]:
    """Of every scenario: the step's time and the load of the busiest device."""
    import numpy as np

    from jaxmoe.bench import clocks

    made = {name: make_step(bench, name, forward) for name in SCENARIOS}
    results: dict[str, dict[str, Any]] = {}
    outputs: dict[str, np.ndarray] = {}
    for name, (operation, output) in made.items():
        program = clocks.compile_on(bench.mesh, output, operation.operands)
        y, rows = program(*operation.operands)
        outputs[name] = runtime.fetch(y).astype(np.float32)
        load = runtime.fetch(rows)[0]
        results[name] = {"busiest": float(load.max() / load.mean()), "rows": load.tolist()}
    for name in ("moved", "replicas"):
        apart = np.abs(outputs[name] - outputs["skewed"]).max()
        allowed = (1e-5 if bench.sizes.dtype == "float32" else 2.0**-6) * np.abs(
            outputs[name]
        ).max()
        if not apart <= allowed:
            raise SystemExit(f"skewed_step: {name} is off by {apart}, {allowed} is allowed.")
    operations = {name: operation for name, (operation, _) in made.items()}
    for name, us in bench.in_turn(operations, bench.sizes.calls).items():
        results[name] |= {"ms": statistics.median(us) / 1e3, "all_ms": [t / 1e3 for t in us]}
    for row in results.values():
        ratios = np.divide(row["all_ms"], results["uniform"]["all_ms"])
        row["by_uniform"] = float(np.median(ratios))
    return results


def measure_lookup(bench: Bench, tokens: int) -> dict[str, Any]:
    """Microseconds of dispatch to slots that are given, and to slots that are looked up."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxmoe
    from jaxmoe import balance
    from jaxmoe.bench.clocks import Operation

    s, count = bench.sizes, bench.num_devices
    slots = s.lookup_experts + s.lookup_redundant
    load = np.random.default_rng(0).permutation(np.arange(1, s.lookup_experts + 1) ** -1.2)
    placement = balance.place(load, num_devices=count, num_replicas=slots)
    group = bench.group(slots, tokens=tokens, dim=s.lookup_dim, top_k=s.lookup_top_k)

    def look_up(ids: Any, placement: Any) -> Any:
        device = jax.lax.axis_index("expert")
        near = balance.near_replicas(placement, device, num_devices=count)
        return balance.choose_replicas(near, ids)

    def make(device: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), device)
        x = jax.random.normal(key, (tokens, s.lookup_dim), jnp.dtype(s.dtype))
        order = jax.random.gumbel(jax.random.fold_in(key, 1), (tokens, s.lookup_experts))
        ids = jax.lax.top_k(order + jnp.log(jnp.asarray(load)), s.lookup_top_k)[1]
        near = balance.near_replicas(placement, device, num_devices=count)
        weights = jnp.full(ids.shape, 1 / s.lookup_top_k, jnp.float32)
        return x, ids, balance.choose_replicas(near, ids), weights, placement

    x, ids, chosen, weights, placement = bench.on_devices(make)

    # The clock's loop writes to each operand in every step: all take the same ones.
    operands = (x, weights, ids, chosen, placement)

    def given(x: Any, weights: Any, ids: Any, chosen: Any, placement: Any) -> Any:
        return jaxmoe.dispatch(group, x, chosen, weights)

    def looked_up(x: Any, weights: Any, ids: Any, chosen: Any, placement: Any) -> Any:
        return jaxmoe.dispatch(group, x, look_up(ids, placement), weights)

    def alone(x: Any, weights: Any, ids: Any, chosen: Any, placement: Any) -> Any:
        # The loop wants floating point first.
        return weights[:1, :1] * jnp.float32(2), look_up(ids, placement)

    def nothing(x: Any, weights: Any, ids: Any, chosen: Any, placement: Any) -> Any:
        return weights[:1, :1] * jnp.float32(2), chosen

    functions = {"given": given, "looked_up": looked_up, "alone": alone, "nothing": nothing}
    times = bench.in_turn(
        {
            name: Operation(name, function, operands, bench.mesh)
            for name, function in functions.items()
        },
        s.lookup_calls,
    )
    us = {name: statistics.median(values) for name, values in times.items()}
    pairs = zip(times["looked_up"], times["given"], strict=True)
    us["added"] = statistics.median(a - b for a, b in pairs)
    return us | {"tokens": tokens, "percent": 100 * us["added"] / us["given"], "all": times}


def print_steps(results: dict[str, dict[str, Any]], say: Any) -> None:
    say(f"{'':10} {'ms a step':>10} {'by uniform':>11} {'busiest device / mean':>22}")
    for name, row in results.items():
        say(f"{name:10} {row['ms']:10.3f} {row['by_uniform']:11.3f} {row['busiest']:22.3f}")
    skewed = results["skewed"]["by_uniform"]
    best = min(("moved", "replicas"), key=lambda name: results[name]["by_uniform"])
    balanced = results[best]["by_uniform"]
    reached = skewed >= 1.4 and balanced <= 1.1
    say(
        f"wanted: from at least 1.4 to at most 1.1; {'reached' if reached else 'missed'}: "
        f"{skewed:.2f} to {balanced:.2f} ({best})"
    )


def print_lookup(rows: list[dict[str, Any]], say: Any) -> None:
    say(
        f"{'dispatch':10} {'given us':>10} {'looked up':>10} {'added us':>10} {'%':>7} {'alone':>8}"
    )
    for row in rows:
        alone = row["alone"] - row["nothing"]
        say(
            f"T={row['tokens']:<8} {row['given']:10.1f} {row['looked_up']:10.1f} "
            f"{row['added']:10.2f} {row['percent']:7.2f} {alone:8.2f}"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--devices", type=int, help="the first N (default: all GPUs, or 8 virtual CPU devices)")
    add("--transport", default="auto")
    add("--what", nargs="+", choices=("steps", "lookup"), default=["steps", "lookup"])
    for field in dataclasses.fields(Sizes):
        kind = {"float": float, "str": str}.get(str(field.type), int)
        defaults = ", ".join(f"{getattr(s, field.name)} on a {name}" for name, s in SIZES.items())
        add(f"--{field.name.replace('_', '-')}", type=kind, help=f"default: {defaults}")
    add("--forward", action="store_true", help="steps without gradients, as in decoding")
    add("--lookup-tokens", type=int, nargs="+", default=[128, 4096])
    add("--threads", action="store_true", help="a CPU device may compute on all cores")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.threads:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    runtime.set_host_devices(args.devices or 8)
    runtime.join_processes()
    import jax

    bench = Bench(args)
    s = bench.sizes
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda *_: None
    group = bench.group(s.experts, tokens=s.tokens, dim=s.dim, top_k=s.top_k)
    report: dict[str, Any] = {
        "device": f"{bench.num_devices} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)),
        "transport": group.transport,
        "jax": jax.__version__,
        "sizes": dataclasses.asdict(s),
    }
    group.close()
    say(", ".join(f"{key} {value}" for key, value in report.items()))
    if "steps" in args.what:
        report["steps"] = measure_steps(bench, args.forward)
        print_steps(report["steps"], say)
    if "lookup" in args.what:
        report["lookup"] = [measure_lookup(bench, tokens) for tokens in args.lookup_tokens]
        print_lookup(report["lookup"], say)
    if args.json is not None and jax.process_index() == 0:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
