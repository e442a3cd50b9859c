"""Times the decoding loop of the example with several transports, one after the other.

    python benchmarks/decode_loop.py --transports p2p xla               # all GPUs of one process
    python -m jaxmoe launch -n 2 benchmarks/decode_loop.py --transports nvshmem xla

Preset decode-gpu unless told otherwise: 8 MoE layers of D=2048, K=8, E=64 with latent attention,
bfloat16 on GPUs, a batch of 64 rows per device. Weights and prompts are random, decoding is greedy
and never stops, so that each transport does the same work; how many of the tokens are the same as
the first transport's is printed, too. Times are of the wall clock, see examples/timing.py; each
stage is announced and timed. The ratio is that of tokens per second to the last transport's; the
floor is the time in which a copy would read the weights of a step.

--profile DIR writes a trace of one call for each transport and lists the kernels of a step. XLA
records no graphs while it is traced, so that there are gaps between these kernels, unless
XLA_FLAGS=--xla_enable_command_buffers_during_profiling=true.

On GPUs compilation is mostly XLA's search for the best Triton configuration of each matmul.
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false leaves them all to cuBLAS and shortens it; a step takes
7% longer then (two H200, jax 0.11.2).
JAX_COMPILATION_CACHE_DIR keeps compiled programs for the next run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import kernel_times
import numpy as np
import values
from flax import nnx
from stages import Stages

import jaxmoe
import runtime
import timing
from generate import Generator, Weights
from loading import narrow
from model import Transformer, make_group, split_model
from presets import PRESETS, ModelConfig
from sampling import SamplingConfig
from training import with_shardings

VOCABULARY = 32768


def make_weights(config: ModelConfig, group: jaxmoe.ExpertParallel, mesh: Any) -> Weights:
    """Random weights in the dtype of the computation; the routers' biases are zero."""

    def shapes() -> Weights:
        _, params, router = split_model(Transformer(config, VOCABULARY, group, rngs=nnx.Rngs(0)))
        return narrow(params, group.dtype), router

    params, router = with_shardings(jax.eval_shape(shapes), mesh)
    return values.draw(params), values.zeros(router)


def make_generator(
    config: ModelConfig,
    group: jaxmoe.ExpertParallel,
    weights: Weights,
    mesh: Any,
    args: argparse.Namespace,
) -> Generator:
    """A loop of args.steps steps behind random prompts, which never stops."""
    model = nnx.eval_shape(lambda: Transformer(config, VOCABULARY, group, rngs=nnx.Rngs(0)))
    shape = (args.batch * mesh.size, args.prompt_length)
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)
    return Generator(
        nnx.graphdef(model),
        weights,
        list(prompts),
        mesh=mesh,
        end_of_text=-1,
        max_new_tokens=1 + args.steps,
        sampling=SamplingConfig(temperature=0.0),
        steps_per_call=args.steps_per_call,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="decode-gpu", choices=PRESETS)
    add("--transports", nargs="+", default=["auto", "xla"])
    add("--batch", type=int, default=64, help="rows on each device")
    add("--steps", type=int, default=256, help="new tokens after the first; whole calls")
    add("--steps-per-call", type=int, default=16)
    add("--prompt-length", type=int, default=32)
    add("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    add("--devices", type=int, help="None: all there are")
    add("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    add("--profile", type=Path, metavar="DIR", help="trace one call, list the kernels of a step")
    # Sizes to use instead of the preset's.
    add("--layers", type=int, help="layers, the dense ones included")
    add("--dim", type=int, help="model width D")
    add("--expert-hidden-dim", type=int, help="width F of an expert")
    add("--attention", choices=["grouped", "latent"])
    args = parser.parse_args()
    for name in ("batch", "steps", "steps_per_call", "prompt_length", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.steps = -(-args.steps // args.steps_per_call) * args.steps_per_call
    return args


def make_config(args: argparse.Namespace) -> ModelConfig:
    """The preset's model with the sizes of the command line, and room for the texts."""
    sizes = {
        "num_layers": args.layers,
        "dim": args.dim,
        "expert_hidden_dim": args.expert_hidden_dim,
        "attention": args.attention,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    return dataclasses.replace(
        PRESETS[args.preset].model,
        **given,
        context=args.prompt_length + args.steps + 1,
        capacity_factor=None,
    )


def weight_bytes(weights: Weights, config: ModelConfig) -> int:
    """What a step reads of the weights on one device, if all of its experts have a token."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights[0]):
        # Of an embedding that is not the head, too, a step reads a row for each token.
        if config.tie_embeddings or "embed" not in jax.tree_util.keystr(path):
            total += leaf.addressable_shards[0].data.nbytes
    return total


def say_floor(weights: Weights, config: ModelConfig, stages: Stages) -> None:
    """Prints how long a step takes at least: to read its weights."""
    on_gpu = jax.local_devices()[0].platform == "gpu"
    speed = kernel_times.copy_bandwidth(1 << 30 if on_gpu else 1 << 26)
    size = weight_bytes(weights, config)
    stages.say(
        f"floor: {size / 1e9:.3f} GB of weights a device and step, {size / speed * 1e3:.3f} ms at "
        f"the {speed / 1e9:,.0f} GB/s of a copy"
    )


def run_transport(
    transport: str,
    config: ModelConfig,
    weights: Weights,
    mesh: Any,
    args: argparse.Namespace,
    stages: Stages,
) -> timing.Times:
    """The fastest of some runs."""
    max_tokens = args.batch * args.prompt_length
    with stages(f"{transport}: make the group"):
        group = make_group(config, mesh, max_tokens=max_tokens, transport=transport)
    generator = make_generator(config, group, weights, mesh, args)
    with stages(f"{transport}: trace and lower prefill and steps"):
        begin, steps = generator.lower_begin(), generator.lower_continue()
    with stages(f"{transport}: compile the prefill"):
        begin.compile()
    with stages(f"{transport}: compile the steps"):
        steps.compile()
    with stages(f"{transport}: first calls"):
        generator.warm_up(streaming=True)
    runs = []
    for i in range(args.repeats):
        times = timing.measure(generator)
        runs.append(times)
        stages.say(f"{transport}: run {i}: {times.tokens_per_second:,.0f} tokens/s")
    best = max(runs, key=lambda times: times.tokens_per_second)
    for line in best.describe().splitlines():
        stages.say(f"{transport}: {line}")
    if args.profile is not None:
        profile(generator, args.profile / transport, stages, transport)
    group.close()
    return best


def profile(generator: Generator, directory: Path, stages: Stages, transport: str) -> None:
    """Prints the kernels of a step, of one call once the program is recorded and warm."""
    state, _ = generator.begin()
    state, progress = generator.resume(state)
    jax.block_until_ready(progress)

    def run() -> None:
        jax.block_until_ready(generator.resume(state))

    found = kernel_times.trace(directory, run)
    lines = ["no GPU in the trace"] if found is None else found.describe(generator.steps_per_call)
    for line in lines:
        stages.say(f"{transport}: {line}")


def main() -> None:
    args = parse_args()
    config = make_config(args)
    runtime.set_host_devices(args.devices or 2)
    runtime.join_processes()
    stages = Stages()
    mesh = runtime.make_mesh(args.devices, data_parallel=1)
    stages.say(
        f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {args.preset}: "
        f"{config.attention} attention, D={config.dim} K={config.top_k} E={config.num_experts} "
        f"F={config.expert_hidden_dim}, {config.num_layers} layers, {args.batch} rows a device"
    )
    with stages("initial values"):
        first = make_group(config, mesh, max_tokens=args.batch, transport="xla")
        weights = make_weights(config, first, mesh)
    say_floor(weights, config, stages)
    found = {t: run_transport(t, config, weights, mesh, args, stages) for t in args.transports}
    base, reference = found[args.transports[-1]], found[args.transports[0]].tokens
    for transport, times in found.items():
        same = float(np.mean(times.tokens == reference))
        ratio = times.tokens_per_second / base.tokens_per_second
        stages.say(
            f"{transport:8} {times.latency(50) * 1e3:.3f} ms a step, "
            f"{times.tokens_per_second:10,.0f} tokens/s, {ratio:.2f} x "
            f"{args.transports[-1]}; {same:.1%} of the tokens as with {args.transports[0]}"
        )
    if args.json is not None and jax.process_index() == 0:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
            "num_processes": jax.process_count(),
            "model": dataclasses.asdict(config),
            "seconds": stages.seconds,
            "transports": {transport: times.as_json() for transport, times in found.items()},
        }
        args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
