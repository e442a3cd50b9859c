"""Continues prompts with a model that pretrain.py trained.

    python examples/decode.py runs/demo --prompt "def " --prompt "import " --stream
    python examples/decode.py runs/demo --temperature 0 --max-new-tokens 64 --weights int8
    python examples/decode.py runs/demo --json times.json --profile trace/

Works on any number of devices that divides the experts, not only on the training's.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import runtime
import timing
from checkpoint import CheckpointError, read_config
from presets import SettingsError, Transport
from tokens import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from generate import Generator


@dataclass(frozen=True)
class DecodeConfig:
    """What to decode, and how."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of a run of pretrain.py."""
    prompt: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-p"])
    ] = ()
    """Text to continue; give the option again for a batch. None given: a new document."""
    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 takes the most likely token each time."""
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0
    step: int | None = None
    """The checkpoint to use; None: the newest."""
    devices: int | None = None
    """None: as many as the training used, if they are there."""
    data_parallel: int = 1
    """Devices of the mesh's data axis; the experts are spread over the others."""
    shard_weights: bool = False
    """Spread the weights over the data axis, too, instead of a copy for each of its devices."""
    transport: Transport = "auto"
    weights: Literal["full", "int8", "fp8", "fp8_blocks"] = "full"
    """Of the routed experts: as trained, or in eight bits with a scale for each output channel, or
    with fp8_blocks one for each 128 x 128 weights, for products on FP8 tensor cores."""
    steps_per_call: int = 8
    """Tokens of a row between two looks of the host: at the clock, at whether all rows have ended,
    and with --stream for printing."""
    rebalance_every: int = 0
    """Steps between two looks at the load of the experts, which may move then; 0: never."""
    redundant_experts: int | None = None
    """Slots for replicas of busy experts, for a model that was trained without; None: as trained.
    With --rebalance-every 0 is enough for experts to change places."""
    stream: bool = False
    """Print the text as it comes."""
    json: Path | None = None
    """Write every figure to this file."""
    profile: Path | None = None
    """Write a trace of a timed batch to this folder; for TensorBoard, xprof or Perfetto."""

    def __post_init__(self) -> None:
        for name, least in (("steps_per_call", 1), ("data_parallel", 1), ("rebalance_every", 0)):
            if getattr(self, name) < least:
                raise SettingsError(
                    f"{name} ({getattr(self, name)}) must be at least {least}. Give "
                    f"--{name.replace('_', '-')} {least} or more."
                )
        if self.max_new_tokens < 1:
            raise SettingsError(
                f"max_new_tokens ({self.max_new_tokens}) must be at least 1: the prefill gives one."
            )


def print_batch(generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Decodes all prompts and prints the texts: in one compiled call, unless experts may move."""
    if generator.balancer is None:
        tokens = generator.generate()
    else:
        *_, tokens = generator.stream()
    for prompt, row in zip(prompts, tokens, strict=True):
        print(f"{'-' * 79}\n{prompt}{tokenizer.decode(row)}")
    print("-" * 79)


def print_stream(generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Decodes in steps and prints what is new after each, labelled if there are several prompts."""
    printed = [""] * len(prompts)
    labels = ["" if len(prompts) == 1 else f"[{i}] " for i in range(len(prompts))]
    end = "" if len(prompts) == 1 else "\n"
    for label, prompt in zip(labels, prompts, strict=True):
        print(f"{label}{prompt}", end=end, flush=True)
    for tokens in generator.stream():
        last = tokens.shape[1] >= generator.max_new_tokens
        for i, row in enumerate(tokens):
            text = tokenizer.decode(row)
            # A character whose bytes have not all come yet waits for the rest.
            text = text if last else text.rstrip("\ufffd")
            if new := text[len(printed[i]) :]:
                print(f"{labels[i]}{new}", end=end, flush=True)
            printed[i] = text
    print()


def print_times(generator: Generator, config: DecodeConfig) -> None:
    """Decodes once more for the times, with a trace if wanted; prints and writes them."""
    import jax

    generator.warm_up(streaming=True)
    trace = (
        contextlib.nullcontext() if config.profile is None else jax.profiler.trace(config.profile)
    )
    with trace:
        times = timing.measure(generator)
    print(times.describe())
    balancer, moves = generator.balancer, {}
    if balancer is not None:
        moves = {"num_looks": balancer.num_looks, "num_moves": balancer.num_moves}
        print(f"balance: {balancer.num_moves} moves of experts in {balancer.num_looks} looks")
    if config.json is not None and runtime.processes().index == 0:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
            "num_processes": jax.process_count(),
            "transport": generator.transport,
            **times.as_json(),
            **moves,
        }
        config.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        config = tyro.cli(DecodeConfig, args=args, description=__doc__)
        run = read_config(config.run_dir)
        runtime.set_host_devices(config.devices or run.devices)
        runtime.join_processes()
        from loading import load_generator

        tokenizer = load_tokenizer(run.tokenizer)
        generator = load_generator(config, run, tokenizer)
        show = print_stream if config.stream else print_batch
        with runtime.only_first_prints():
            show(generator, tokenizer, config.prompt or ("",))
            print_times(generator, config)
    except (SettingsError, CheckpointError) as error:
        print(f"decode: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
