"""Progress of a benchmark: what is being done is printed before it, how long it took after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax


class Stages:
    """Names and times the stages of a run, in the first process.

    A stage's name is printed when it begins, so that the last line of a run that was killed says
    where it was.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """Of the finished stages, by name; of equal names the last."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Around the work of a stage; wait for the devices inside it."""
        self.say(f"{name} ...")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.say(f"{name}: {self.seconds[name]:.2f} s")

    def say(self, text: str) -> None:
        """Prints a line with the seconds since the beginning."""
        if jax.process_index() == 0:
            print(f"[{time.perf_counter() - self._begin:6.1f} s] {text}", flush=True)
