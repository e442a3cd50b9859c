"""Placements for the tests of `jaxmoe.balance`, and what they mean in plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from jaxmoe.balance import Placement, placement_of


def random_placement(
    rng: np.random.Generator, num_experts: int, num_slots: int, num_empty: int = 0
) -> Placement:
    """Every expert once, further replicas of random experts, and empty slots, in random order."""
    more = num_slots - num_experts - num_empty
    slots = [*range(num_experts), *rng.integers(0, num_experts, more), *[-1] * num_empty]
    return placement_of(rng.permutation(slots), num_experts)


@st.composite
def placements(draw, num_devices: int = 8, max_width: int = 4) -> Placement:
    """Placements over `num_devices` devices of 1 to `max_width` slots, some of them empty."""
    num_slots = num_devices * draw(st.integers(1, max_width))
    num_experts = draw(st.integers(1, num_slots))
    num_empty = draw(st.integers(0, num_slots - num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_placement(rng, num_experts, num_slots, num_empty)


def slots_of(placement: Placement, expert: int) -> list[int]:
    """The slots that hold an expert, in ascending order."""
    return np.flatnonzero(np.asarray(placement.slot_experts) == expert).tolist()


def zipf(num_experts: int, exponent: float = 1.2) -> np.ndarray:
    """The load of an expert by its rank; sums to one."""
    load = np.arange(1, num_experts + 1) ** -exponent
    return load / load.sum()
