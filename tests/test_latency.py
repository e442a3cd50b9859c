"""Which calls take the low-latency kernels: `mode`."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import latency
from jaxmoe.transport import cuda

LAYOUT = Path(__file__).parent.parent / "xla_ffi/cuda/layout.h"
DEEPSEEK = dict(num_devices=2, top_k=8, row_bytes=7168 * 2)


@pytest.mark.parametrize(
    "mode, max_tokens, want",
    [
        ("throughput", 128, 0),
        ("low_latency", 900, 900),
        ("auto", 128, 128),
        ("auto", 4096, 585),  # whose rows are 8 MiB
    ],
)
def test_tokens_of_a_mode(mode: str, max_tokens: int, want: int):
    assert latency.tokens_of(mode, max_tokens, **DEEPSEEK) == want


def test_narrow_rows_and_many_devices_have_limits_too():
    assert latency.tokens_of("auto", 4096, num_devices=2, top_k=2, row_bytes=128) == 1024
    assert latency.tokens_of("auto", 4096, num_devices=72, top_k=8, row_bytes=128) == 28
    assert latency.most_tokens(72, 32) == 7


def test_limit_stands_in_two_places_alike():
    found = re.search(r"kMaxLatencyChoices = (\d+);", LAYOUT.read_text())
    assert found and int(found[1]) == latency.MAX_CHOICES


def group_of(mode: str) -> jaxmoe.ExpertParallel:
    return jaxmoe.ExpertParallel(
        num_experts=4, top_k=2, dim=8, max_tokens=6, dtype=jnp.float32, mode=mode
    )


@pytest.mark.parametrize("puts", [False, True])
def test_sizes_of_the_heap_say_which_calls(puts: bool):
    """With peers that stores do not reach there is no low latency, whatever the mode."""
    for mode, want in (("auto", 6), ("low_latency", 6), ("throughput", 0)):
        sizes = cuda.sizes_of(group_of(mode).spec, puts)
        assert sizes.latency_tokens == (0 if puts else want)


def test_other_transports_take_any_mode():
    """And have one kind of kernels: a program for GPUs runs on CPUs as it is."""
    x = np.arange(48, dtype=np.float32).reshape(6, 8)
    ids = jnp.asarray(np.arange(12, dtype=np.int32).reshape(6, 2) % 4)
    results = []
    for mode in latency.MODES:
        group = group_of(mode)
        assert group.latency_tokens == 0 and group.spec.mode == mode
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, jnp.ones((6, 2)))
        results.append(np.asarray(jaxmoe.combine(group, rows, row_weights, plan)))
    for y in results:
        np.testing.assert_array_equal(y, 2 * x)
