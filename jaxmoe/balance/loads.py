"""Loads of experts over time, synthetic or recorded, and choices of tokens that follow them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.balance.eplb import check_load

PATTERNS = ("zipf", "drifting", "bursts")
# Of the random walk of a drifting load's logarithm per step, and of the pull back to its beginning.
_DRIFT, _RETURN = 0.08, 0.01
# A burst: how much busier an expert gets, for how many steps, and how many of 100 are in one.
_BURST, _BURST_STEPS, _BURST_SHARE = 8.0, 12, 0.03
# A topic's tokens prefer its experts by this factor: e^2.
_TOPIC = 2.0


def synthetic_loads(
    pattern: str, *, num_steps: int, num_experts: int, exponent: float = 1.2, seed: int = 0
) -> np.ndarray:
    """[steps, E] loads that sum to one in each step.

    All begin as Zipf: the n-th busiest expert has n^-exponent; which one that is, is drawn.

    Args:
      pattern: "zipf" stays so; "drifting": the logarithms walk at random; "bursts": now and then an
        expert is eight times as busy for some steps, as when a batch is about one subject.
      num_steps, num_experts: sizes.
      exponent: 0 is an even load.
      seed: of all that is drawn.
    """
    if pattern not in PATTERNS:
        raise ValueError(
            f"`synthetic_loads`: pattern must be one of {', '.join(PATTERNS)}; got {pattern!r}."
        )
    rng = np.random.default_rng(seed)
    start = -exponent * np.log(1 + rng.permutation(num_experts))
    logs = np.tile(start, (num_steps, 1))
    if pattern == "drifting":
        for step in range(1, num_steps):
            noise = _DRIFT * rng.standard_normal(num_experts)
            logs[step] = logs[step - 1] + _RETURN * (start - logs[step - 1]) + noise
    elif pattern == "bursts":
        begins = rng.random((num_steps, num_experts)) < _BURST_SHARE / _BURST_STEPS
        for step, expert in np.argwhere(begins):
            logs[step : step + _BURST_STEPS, expert] = start[expert] + np.log(_BURST)
    loads = np.exp(logs - logs.max(-1, keepdims=True))
    return np.asarray(loads / loads.sum(-1, keepdims=True))


def recorded_loads(path: Path, layer: int = 0) -> np.ndarray:
    """[steps, E] loads of one layer from a file, each step's divided by its sum.

    Args:
      path: `metrics.jsonl` of a run of examples/pretrain.py, or a NumPy file (.npy) of
        [steps, E] or [steps, layers, E].
      layer: which of the layers.

    Raises:
      ValueError: a file of another form, a layer that it does not have, bad loads.
    """
    if path.suffix == ".npy":
        loads = np.load(path)
    else:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        loads = np.array([r["tokens_per_expert"] for r in records if "tokens_per_expert" in r])
    if loads.ndim == 2:
        loads = loads[:, None]
    if loads.ndim != 3 or not loads.size or not 0 <= layer < loads.shape[1]:
        raise ValueError(
            f"`recorded_loads`: {path} holds loads of shape {list(loads.shape)}; wanted [steps, "
            f"layers, E] with a layer {layer}. Give metrics.jsonl of a run, or a .npy file."
        )
    checked = check_load("recorded_loads", loads[:, layer])
    return np.asarray(checked / checked.sum(-1, keepdims=True))


def draw_choices(
    load: Any, *, num_devices: int, num_tokens: int, top_k: int, num_topics: int, seed: int
) -> np.ndarray:
    """[R, T, K] int32 different experts per token, busy ones more often.

    By the Gumbel trick from the logarithm of the load. Every token has a topic, and the experts of
    its topic (e mod topics, shuffled) are e^2 times as likely, so that some experts go together.

    Args:
      load: [E].
      num_devices, num_tokens, top_k: R, T and K.
      num_topics: 1 for none.
      seed: of the tokens; which experts belong to a topic does not depend on it.
    """
    loads = np.asarray(load, np.float64)
    rng = np.random.default_rng([seed, 1])
    topic_of = np.random.default_rng(0).permutation(len(loads)) % num_topics
    topic = rng.integers(0, num_topics, num_devices * num_tokens)
    logs = np.log(np.maximum(loads, 1e-12)).astype(np.float32)
    uniform = rng.random((len(topic), len(loads)), np.float32)
    scores = logs - np.log(-np.log(np.maximum(uniform, 1e-30)))
    if num_topics > 1:
        scores += np.float32(_TOPIC) * (topic_of == topic[:, None])
    best = np.argpartition(-scores, top_k - 1, axis=-1)[:, :top_k]
    return best.astype(np.int32).reshape(num_devices, num_tokens, top_k)
