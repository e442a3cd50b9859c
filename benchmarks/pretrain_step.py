"""Times the training step of the pretraining example with several transports, one after the other.

    python benchmarks/pretrain_step.py                                  # all GPUs of one process
    python -m jaxmoe launch -n 2 benchmarks/pretrain_step.py --transports nvshmem xla

Preset bench-gpu (MoE layers of D=2048, K=8, E=64) unless told otherwise; tokens are random, and
nothing is written. A figure is the median over the steps after two to warm up, in wall clock.
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

import runtime
from model import make_group
from presets import PRESETS, RunConfig
from training import Learner

VOCABULARY = 256


def seconds_per_step(config: RunConfig, transport: str, steps: int) -> list[float]:
    mesh = runtime.make_mesh(config.devices, config.data_parallel)
    cfg, model = config.train, config.model
    rows = cfg.batch_size // cfg.accumulate
    max_tokens = -(-rows // mesh.size) * model.context
    group = make_group(model, mesh, max_tokens=max_tokens, transport=transport)
    learner = Learner(config, VOCABULARY, group, mesh)
    state = learner.init()
    rng = np.random.default_rng(0)
    shape = (cfg.accumulate, rows, model.context + 1)
    times = []
    for _ in range(steps + 2):
        tokens = rng.integers(0, VOCABULARY, shape).astype(np.int32)
        batch = runtime.put(tokens, learner.batch_sharding)
        start = time.perf_counter()
        state, report = learner.train_step(state, batch)
        loss = float(report.loss)
        times.append(time.perf_counter() - start)
        if not np.isfinite(loss):
            raise SystemExit(f"{transport}: the loss is {loss}")
    if jax.process_index() == 0:
        print(f"{transport:8} first step {times[0]:.1f} s, loss {loss:.3f}", flush=True)
    group.close()
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="bench-gpu", choices=PRESETS)
    parser.add_argument("--transports", nargs="+", default=["p2p", "xla"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, help="instead of the preset's number of layers")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    if args.layers:
        model = dataclasses.replace(config.model, num_layers=args.layers)
        config = dataclasses.replace(config, model=model)
    runtime.set_host_devices(config.devices)
    runtime.join_processes()
    if jax.process_index() == 0:
        m, t = config.model, config.train
        print(
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, "
            f"{args.preset}: D={m.dim} K={m.top_k} E={m.num_experts} F={m.expert_hidden_dim}, "
            f"{m.num_layers} layers, {t.batch_size * m.context} tokens a step",
            flush=True,
        )
    medians = {}
    for transport in args.transports:
        times = seconds_per_step(
            dataclasses.replace(config, transport=transport), transport, args.steps
        )
        medians[transport] = statistics.median(times)
        if jax.process_index() == 0:
            ratio = medians[args.transports[-1]] if transport == args.transports[-1] else None
            print(
                f"{transport:8} {medians[transport] * 1e3:9.1f} ms a step, "
                f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"
                + (
                    f"; {ratio / medians[args.transports[0]]:.2f} x {args.transports[0]}"
                    if ratio
                    else ""
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
