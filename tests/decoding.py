"""Models, prompts and generators for the tests of decoding, and what to look for in programs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from examples_support import ROOT  # noqa: F401  (puts examples/ on the path)
from flax import nnx

from generate import Generator
from model import Transformer, make_group, split_model
from presets import PRESETS, ModelConfig
from runtime import make_mesh
from sampling import SamplingConfig

VOCAB_SIZE = 61
END = VOCAB_SIZE - 1
GREEDY = SamplingConfig(temperature=0.0)
CONFIGS = {
    name: dataclasses.replace(PRESETS[preset].model, dtype="float32")
    for name, preset in (("grouped", "tiny"), ("latent", "tiny-latent"))
}
PROMPT_LENGTHS = (1, 7, 4, 12, 2, 9)


def make_model(
    config: ModelConfig, num_devices: int, num_tokens: int = 4096, transport: str = "auto"
) -> Transformer:
    """A model of random weights that are large enough for its texts to vary."""
    mesh = make_mesh(num_devices, data_parallel=1)
    group = make_group(config, mesh, max_tokens=num_tokens, transport=transport)
    model = Transformer(config, VOCAB_SIZE, group, rngs=nnx.Rngs(0))
    graphdef, params, router = split_model(model)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.2 * noise.standard_normal(p.shape, np.float32), params)
    return nnx.merge(graphdef, params, router)


def random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB_SIZE, (rows, length), dtype=np.int32)


@nnx.jit
def run_whole(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens).logits


def naive_greedy(model: Transformer, prompt: np.ndarray, num_new: int) -> list[int]:
    """Greedy decoding by running the whole text again for every token."""
    text = np.zeros((1, model.config.context), np.int32)
    text[0, : len(prompt)] = prompt
    new: list[int] = []
    for i in range(num_new):
        # What stands behind the last token cannot be seen by it.
        logits = run_whole(model, jnp.asarray(text))[0, len(prompt) + i - 1]
        new.append(int(jnp.argmax(logits)))
        if new[-1] == END:
            return new + [END] * (num_new - len(new))
        text[0, len(prompt) + i] = new[-1]
    return new


def make_generator(model: Transformer, num_new: int = 20, **options: Any) -> Generator:
    """Greedy decoding of prompts of different lengths."""
    graphdef, params, router = split_model(model)
    return Generator(
        graphdef,
        options.pop("weights", (params, router)),
        [random_tokens(1, length)[0] for length in PROMPT_LENGTHS],
        mesh=model.mesh,
        max_new_tokens=num_new,
        sampling=GREEDY,
        **{"end_of_text": END, **options},
    )


def cache_shape(generator: Generator) -> tuple[int, ...]:
    """Of one device's part of one array of a cache."""
    state, _ = generator.lower_begin().out_info
    shape = state.caches[0][0].shape
    return (shape[0] // generator.mesh.size, *shape[1:])


def cache_copies(
    hlo: str,
    shape: tuple[int, ...],
    kinds: tuple[str, ...] = ("copy", "copy-start", "transpose", "pad"),
) -> list[str]:
    """Instructions of loops that write a whole array of a cache's sizes, in any order, anew."""
    lines: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines[head[1]] = current = []
        elif lines:
            current.append(line.strip())
    waiting = re.findall(r"body=%?([\w.\-]+)", hlo)
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in lines and name not in inside:
            inside.add(name)
            waiting += re.findall(r"%?([\w.\-]+)", " ".join(_called(lines[name])))
    wanted = sorted(size for size in shape if size != 1)
    found = []
    for line in (line for name in inside for line in lines[name]):
        made = re.search(r"= \w+\[([\d,]+)\]\S* ([\w\-]+)\(", line)
        if made and made[2] in kinds and _sizes(made[1]) == wanted:
            found.append(line[:150])
    return found


def _sizes(shape: str) -> list[int]:
    return sorted(int(size) for size in shape.split(",") if size != "1")


def _called(lines: list[str]) -> list[str]:
    """The computations that instructions call."""
    pattern = r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|[\w.%\-]+)"
    return [name for line in lines for name in re.findall(pattern, line)]


def captured(thunks: str) -> tuple[list[str], list[str]]:
    """The custom calls inside and outside of command buffers; XLA's dump does not name them.

    thunks: XLA's dump of a program as it runs on a GPU (thunk_sequence_after_thunk_passes.txt): a
      line for each step, "<indent><number>: k<Kind> ...", what a step consists of indented under
      it.
    """
    inside: list[str] = []
    outside: list[str] = []
    around: list[tuple[int, str]] = []
    for line in thunks.splitlines():
        step = re.match(r"(\s*)(?:\d+:\s+)?(k[A-Z]\w*)\b", line)
        if step is None:
            continue
        indent, kind = len(step[1]), step[2]
        while around and around[-1][0] >= indent:
            around.pop()
        if kind == "kCustomCall":
            recorded = any(kind == "kCommandBuffer" for _, kind in around)
            (inside if recorded else outside).append(line.strip())
        around.append((indent, kind))
    return inside, outside
