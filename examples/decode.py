"""Continues prompts with a model that pretrain.py trained.

    python examples/decode.py runs/demo --prompt "def " --prompt "import " --stream
    python examples/decode.py runs/demo --temperature 0 --max-new-tokens 64 --weights int8

Works on any number of devices that divides the experts, not only on the training's.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

import runtime
from checkpoint import CheckpointError, Checkpoints, read_config
from presets import RunConfig, SettingsError, Transport
from tokens import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from generate import Generator

# Steps between two looks at the tokens when streaming.
_STREAM_CHUNK = 8


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
    transport: Transport = "auto"
    weights: Literal["full", "int8", "fp8"] = "full"
    """Of the routed experts: as trained, or in eight bits with a scale for each output channel."""
    stream: bool = False
    """Print the text as it comes."""


def load_generator(config: DecodeConfig, run: RunConfig, tokenizer: Tokenizer) -> Generator:
    """The model of a checkpoint with the prompts of the command line.

    Raises CheckpointError for missing or damaged checkpoints, SettingsError for prompts or devices
    that do not fit.
    """
    from flax import nnx

    from generate import Generator, rows_per_device
    from model import Transformer, make_group, quantize_model, split_model
    from sampling import SamplingConfig
    from training import with_shardings

    sampling = SamplingConfig(config.temperature, config.top_k, config.top_p, config.seed)
    prompts = [_encode(tokenizer, text) for text in config.prompt or ("",)]
    checkpoints = Checkpoints(config.run_dir)
    step = _choose_step(checkpoints, config)
    mesh = runtime.make_mesh(_num_devices(config, run), data_parallel=1)
    # Decoding drops no tokens: a text must not depend on what else is in the batch.
    model_config = dataclasses.replace(run.model, capacity_factor=None)
    group = make_group(
        model_config,
        mesh,
        max_tokens=rows_per_device(len(prompts), mesh) * max(map(len, prompts)),
        transport=config.transport,
    )
    model = nnx.eval_shape(
        lambda: Transformer(model_config, tokenizer.vocab_size, group, rngs=nnx.Rngs(0))
    )
    graphdef, params, router = split_model(model)
    weights = checkpoints.read_model(step, *with_shardings((params, router), mesh))
    state = (weights["params"], weights["router"])
    if config.weights != "full":
        graphdef, *state = quantize_model(nnx.merge(graphdef, *state), config.weights)
    return Generator(
        graphdef,
        tuple(state),
        prompts,
        mesh=mesh,
        end_of_text=tokenizer.end_of_text,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
    )


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a prompt; an empty one begins a new document."""
    ids = tokenizer.encode(text)
    return ids if len(ids) else np.array([tokenizer.end_of_text], np.int32)


def _choose_step(checkpoints: Checkpoints, config: DecodeConfig) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(
            f"{config.run_dir} has no finished checkpoint. Train on with: python "
            f"examples/pretrain.py --run-dir {config.run_dir} --resume"
        )
    if config.step is not None and config.step not in steps:
        raise CheckpointError(
            f"{config.run_dir} has no checkpoint of step {config.step}, but of: "
            f"{', '.join(map(str, steps))}. Give one of these, or leave --step out for the newest."
        )
    return steps[-1] if config.step is None else config.step


def _num_devices(config: DecodeConfig, run: RunConfig) -> int | None:
    """What was asked for, else what the training used, as far as it is there."""
    import jax

    if config.devices is not None or run.devices is None:
        return config.devices
    return min(run.devices, jax.device_count())


def print_batch(generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Decodes all prompts in one compiled call, prints the texts and the speed of both phases."""
    generator.warm_up(streaming=False)
    start = time.perf_counter()
    generator.generate(1)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    tokens = generator.generate()
    decode = time.perf_counter() - start - prefill
    for prompt, row in zip(prompts, tokens, strict=True):
        print(f"{'-' * 79}\n{prompt}{tokenizer.decode(row)}")
    print("-" * 79)
    _print_speed(generator, tokens, prefill, decode)


def print_stream(generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Decodes in steps and prints what is new after each, labelled if there are several prompts."""
    generator.warm_up(streaming=True)
    printed = [""] * len(prompts)
    labels = ["" if len(prompts) == 1 else f"[{i}] " for i in range(len(prompts))]
    end = "" if len(prompts) == 1 else "\n"
    for label, prompt in zip(labels, prompts, strict=True):
        print(f"{label}{prompt}", end=end, flush=True)
    times = [time.perf_counter()]
    for tokens in generator.stream(_STREAM_CHUNK):
        times.append(time.perf_counter())
        last = tokens.shape[1] >= generator.max_new_tokens
        for i, row in enumerate(tokens):
            text = tokenizer.decode(row)
            # A character whose bytes have not all come yet waits for the rest.
            text = text if last else text.rstrip("\ufffd")
            if new := text[len(printed[i]) :]:
                print(f"{labels[i]}{new}", end=end, flush=True)
            printed[i] = text
    print()
    _print_speed(generator, tokens, times[1] - times[0], times[-1] - times[1])


def _print_speed(generator: Generator, tokens: np.ndarray, prefill: float, decode: float) -> None:
    # A row's tokens count up to its end-of-text; the first comes from the prefill.
    ended = np.cumsum(tokens == generator.end_of_text, axis=1) - (tokens == generator.end_of_text)
    num_new = int((ended == 0).sum()) - len(tokens)
    print(
        f"prefill: {generator.num_prompt_tokens} tokens in {prefill * 1e3:.0f} ms "
        f"({generator.num_prompt_tokens / prefill:,.0f} tokens/s)\n"
        f"decode:  {num_new} tokens in {decode * 1e3:.0f} ms "
        f"({num_new / max(decode, 1e-9):,.0f} tokens/s, {len(tokens)} at a time)"
    )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = tyro.cli(DecodeConfig, args=args, description=__doc__)
    try:
        run = read_config(config.run_dir)
        runtime.set_host_devices(config.devices or run.devices)
        runtime.join_processes()
        tokenizer = load_tokenizer(run.tokenizer)
        generator = load_generator(config, run, tokenizer)
        show = print_stream if config.stream else print_batch
        with runtime.only_first_prints():
            show(generator, tokenizer, config.prompt or ("",))
    except (SettingsError, CheckpointError) as error:
        print(f"decode: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
