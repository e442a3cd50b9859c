"""How long decoding takes: the first token, a token's latency, tokens per second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from generate import Generator, Progress

# Calls under way: while one runs, the next waits on the device, which so is never idle.
_CALLS_QUEUED = 2


@dataclass(frozen=True)
class Times:
    """Of one batch of prompts. Times are in seconds, of the wall clock."""

    tokens: np.ndarray
    """int32 [rows, new tokens]"""
    num_tokens: int
    """New tokens of all rows up to their ends, without the first ones, which the prefill gives."""
    num_prompt_tokens: int
    num_devices: int
    first_token: float
    """From the prompts to the first token of all rows."""
    step: list[float]
    """Of a step, in each call of `steps_per_call` of them: the mean over the call."""
    steps_per_call: int

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, after the first token."""
        seconds = sum(self.step) * self.steps_per_call
        return self.num_tokens / seconds if seconds else 0.0

    def latency(self, percent: float) -> float:
        """Percentile of the time between two tokens of a row; 0 where there was no step."""
        return float(np.percentile(self.step, percent)) if self.step else 0.0

    def describe(self) -> str:
        """A few lines for a terminal."""
        speed, first = self.tokens_per_second, self.first_token
        return (
            f"prefill: {self.num_prompt_tokens} tokens in {first * 1e3:.1f} ms, the time to the "
            f"first token ({self.num_prompt_tokens / first:,.0f} tokens/s)\n"
            f"decode:  {self.num_tokens} tokens, {len(self.tokens)} at a time: {speed:,.0f} "
            f"tokens/s, {speed / self.num_devices:,.0f} a device ({self.num_devices})\n"
            f"latency: p50 {self.latency(50) * 1e3:.3f} ms, p99 {self.latency(99) * 1e3:.3f} ms a "
            f"token, over {len(self.step)} calls of {self.steps_per_call} steps"
        )

    def as_json(self) -> dict[str, Any]:
        """The figures for a file."""
        return {
            "num_rows": len(self.tokens),
            "num_devices": self.num_devices,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_new_tokens": self.num_tokens,
            "steps_per_call": self.steps_per_call,
            "num_calls": len(self.step),
            "time_to_first_token_us": self.first_token * 1e6,
            "token_p50_us": self.latency(50) * 1e6,
            "token_p99_us": self.latency(99) * 1e6,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": self.tokens_per_second / self.num_devices,
        }


def measure(generator: Generator) -> Times:
    """Decodes the prompts and times it; compile first, with `Generator.warm_up`.

    Nobody looks at the clock within a call of `steps_per_call` steps: a callback to the host would
    take longer than a step does. A step's time is therefore its call's by their number, and the
    percentiles are over calls; what varies within one is averaged out. While a call runs, the next
    one is queued, so that its start costs nothing. Fewer steps a call show more of the spread,
    until the starts begin to count.
    """
    start = time.perf_counter()
    state, progress = generator.begin()
    done = bool(progress.done)
    last = time.perf_counter()
    first_token, step = last - start, []
    queued: list[Progress] = []
    steps, planned = generator.steps_per_call, 1
    while not done:
        while len(queued) < _CALLS_QUEUED and generator.has_room(planned):
            state, progress = generator.resume(state)
            queued.append(progress)
            planned += steps
        if not queued:
            break
        done = bool(queued.pop(0).done)
        now = time.perf_counter()
        step.append((now - last) / steps)
        last = now
    tokens = generator.so_far(state)
    return Times(
        tokens=tokens,
        num_tokens=count_new(tokens, generator.end_of_text) - len(tokens),
        num_prompt_tokens=generator.num_prompt_tokens,
        num_devices=generator.mesh.size,
        first_token=first_token,
        step=step,
        steps_per_call=steps,
    )


def count_new(tokens: np.ndarray, end_of_text: int) -> int:
    """Tokens of all rows up to their end-of-text, which counts as one."""
    ended = np.cumsum(tokens == end_of_text, axis=1) - (tokens == end_of_text)
    return int((ended == 0).sum())
