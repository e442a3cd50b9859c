"""Times the training step of the pretraining example with several transports, one after the other.

    python benchmarks/pretrain_step.py                                  # all GPUs of one process
    python -m jaxmoe launch -n 2 benchmarks/pretrain_step.py --transports nvshmem xla

Preset bench-gpu (MoE layers of D=2048, K=8, E=64) unless told otherwise; tokens are random, and
nothing is written. A figure is the median over the steps after two to warm up, in wall clock. Each
stage is announced and timed: initial values, tracing and lowering, compilation, the first step.

On GPUs compilation is mostly XLA's search for the best Triton configuration of each matmul.
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false leaves them all to cuBLAS and shortens it.
JAX_COMPILATION_CACHE_DIR keeps compiled programs for the next run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import numpy as np
import values
from stages import Stages

import runtime
from model import make_group
from presets import PRESETS, RunConfig
from training import Learner

VOCABULARY = 256
WARM_UP = 2


def seconds_per_step(config: RunConfig, transport: str, steps: int, stages: Stages) -> list[float]:
    """Of `steps` steps after the warm-up."""
    mesh = runtime.make_mesh(config.devices, config.data_parallel)
    cfg, model = config.train, config.model
    rows = cfg.batch_size // cfg.accumulate
    max_tokens = -(-rows // mesh.size) * model.context
    with stages(f"{transport}: make the group"):
        group = make_group(model, mesh, max_tokens=max_tokens, transport=transport)
    with stages(f"{transport}: trace the model"):
        learner = Learner(config, VOCABULARY, group, mesh)
    with stages(f"{transport}: initial values"):
        abstract = learner.abstract_state
        state = values.zeros(abstract)._replace(params=values.draw(abstract.params))
    rng = np.random.default_rng(0)
    shape = (cfg.accumulate, rows, model.context + 1)

    def next_batch() -> jax.Array:
        tokens = rng.integers(0, VOCABULARY, shape).astype(np.int32)
        return runtime.put(tokens, learner.batch_sharding)

    with stages(f"{transport}: trace and lower the step"):
        lowered = learner.train_step.lower(learner.abstract_state, next_batch())
    with stages(f"{transport}: compile the step"):
        train_step = lowered.compile()
    memory = train_step.memory_analysis()
    if memory is not None:
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        stages.say(f"{transport}: {used / 2**30:.1f} GiB a device for arguments and temporaries")
    times = []
    for i in range(steps + WARM_UP):
        batch = next_batch()
        if i == 0:
            stages.say(f"{transport}: first step ...")
        start = time.perf_counter()
        state, report = train_step(state, batch)
        loss = float(report.loss)
        times.append(time.perf_counter() - start)
        stages.say(f"{transport}: step {i}: {times[-1] * 1e3:.1f} ms, loss {loss:.3f}")
        if not np.isfinite(loss):
            raise SystemExit(f"{transport}: the loss is {loss}")
    group.close()
    return times[WARM_UP:]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="bench-gpu", choices=PRESETS)
    parser.add_argument("--transports", nargs="+", default=["p2p", "xla"])
    parser.add_argument("--steps", type=int, default=8)
    # Sizes to use instead of the preset's.
    parser.add_argument("--layers", type=int, help="layers, the dense ones included")
    parser.add_argument("--dim", type=int, help="model width D")
    parser.add_argument("--expert-hidden-dim", type=int, help="width F of an expert")
    parser.add_argument("--context", type=int, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, help="windows of a step")
    return parser.parse_args()


def make_config(args: argparse.Namespace) -> RunConfig:
    """The preset with the sizes of the command line."""
    config = PRESETS[args.preset]
    sizes = {
        "num_layers": args.layers,
        "dim": args.dim,
        "expert_hidden_dim": args.expert_hidden_dim,
        "context": args.context,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    train = config.train
    if args.batch_size is not None:
        train = dataclasses.replace(train, batch_size=args.batch_size)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **given), train=train
    )


def main() -> None:
    args = parse_args()
    config = make_config(args)
    runtime.set_host_devices(config.devices)
    runtime.join_processes()
    stages = Stages()
    m, t = config.model, config.train
    stages.say(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"{args.preset}: D={m.dim} K={m.top_k} E={m.num_experts} F={m.expert_hidden_dim}, "
        f"{m.num_layers} layers, {t.batch_size * m.context} tokens a step"
    )
    medians: dict[str, float] = {}
    for transport in args.transports:
        times = seconds_per_step(
            dataclasses.replace(config, transport=transport), transport, args.steps, stages
        )
        medians[transport] = statistics.median(times)
        compiling = stages.seconds[f"{transport}: compile the step"]
        stages.say(
            f"{transport:8} {medians[transport] * 1e3:9.1f} ms a step, "
            f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}; compiled in {compiling:.1f} s"
        )
    first, last = args.transports[0], args.transports[-1]
    if first != last:
        stages.say(f"{last} / {first}: {medians[last] / medians[first]:.2f}")


if __name__ == "__main__":
    main()
