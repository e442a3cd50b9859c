"""The FP8 wire format: every bit against NumPy, its error against exact arithmetic, odd numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8 import E4M3, LEAST_SCALE, exact, from_definition
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import wire

DTYPES = ("bfloat16", "float16", "float32")
BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
MATRICES = [(dtype, rule) for dtype in DTYPES for rule in wire.SCALES]


@functools.cache
def programs(dtype: str, rule: str) -> tuple[Any, Any]:
    quantize = jax.jit(lambda x: wire.quantize(x, rule))
    return quantize, jax.jit(lambda codes, scales: wire.dequantize(codes, scales, dtype))


def assert_equal_bits(got: Any, want: np.ndarray) -> None:
    got = np.asarray(got)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(unsigned), want.view(unsigned))


def check(x: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that is promised of finite tokens; codes, scales and what comes out."""
    quantize, dequantize = programs(x.dtype.name, rule)
    codes, scales = map(np.asarray, quantize(x))
    want_codes, want_scales = from_definition(x, rule)
    assert_equal_bits(scales, want_scales)
    assert_equal_bits(codes, want_codes)
    value = exact(codes, scales)
    x64 = x.astype(np.float64)
    spread = np.repeat(scales, 128, axis=1)[:, : x.shape[1]].astype(np.float64)
    bound = np.maximum(2.0**-4 * np.abs(x64), 2.0**-10 * spread) * (1 + 2.0**-20)
    assert (np.abs(value - x64) <= bound).all()
    out = np.asarray(dequantize(codes, scales))
    assert_equal_bits(out, value.astype(np.float32).astype(x.dtype))
    assert np.isfinite(out.astype(np.float32)).all()
    return codes, scales, out


def any_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Every finite number of the dtype with the same chance, in blocks of like exponents."""
    kind = BITS[dtype]
    bits = rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    x = bits.view(jnp.dtype(dtype))
    return np.where(np.isfinite(x.astype(np.float32)), x, np.zeros((), x.dtype))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    matrix=st.sampled_from(MATRICES),
    magnitude=st.floats(-40, 38),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
)
def test_every_bit_is_the_definition(seed, matrix, magnitude, spread):
    """Normal draws of any magnitude, with blocks of wide or narrow range."""
    (dtype, rule), rng = matrix, np.random.default_rng(seed)
    x = rng.standard_normal((6, 300)) * 10.0 ** (magnitude + spread * rng.standard_normal((6, 300)))
    largest = float(ml_dtypes.finfo(jnp.dtype(dtype)).max)
    check(np.clip(x, -largest, largest).astype(jnp.dtype(dtype)), rule)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), matrix=st.sampled_from(MATRICES))
def test_any_finite_bits(seed, matrix):
    check(any_bits(np.random.default_rng(seed), (6, 300), matrix[0]), matrix[1])


@pytest.mark.parametrize("dtype, rule", MATRICES)
def test_the_ends_of_the_range(dtype: str, rule: str):
    """Largest numbers come out finite; the smallest, and subnormal ones, within the bound."""
    info = ml_dtypes.finfo(jnp.dtype(dtype))
    largest, smallest = float(info.max), float(info.smallest_subnormal)
    ends = [largest, largest / 2, largest / 448, 1.75 * 2.0 ** (info.maxexp - 1), smallest]
    tiny = [float(info.tiny), float(info.tiny) / 2, 448 * LEAST_SCALE, LEAST_SCALE / 1024]
    x = np.zeros((2 * len(ends) + len(tiny) + 1, 130), jnp.dtype(dtype))
    for row, number in zip(x, [*ends, *tiny], strict=False):
        row[:128] = number * np.linspace(-1, 1, 128)
        row[128] = -number
    x[-1] = -0.0
    codes, _, out = check(x, rule)
    assert (codes[-1] == 0x80).all()
    assert np.signbit(out[-1].astype(np.float32)).all()


@pytest.mark.parametrize("rule", wire.SCALES)
def test_what_fp8_holds_is_exact(rule: str):
    """All finite codes, with a scale that is a power of two: each comes out as it was."""
    codes = np.arange(256, dtype=np.uint8)
    codes = np.where((codes & 0x7F) == 0x7F, np.uint8(0x7E), codes).reshape(2, 128)
    x = (codes.view(E4M3).astype(np.float32) * np.float32(2.0**5)).astype(jnp.bfloat16)
    got, scales, out = check(x, rule)
    np.testing.assert_array_equal(scales, np.float32(2.0**5))
    np.testing.assert_array_equal(got, codes)
    assert_equal_bits(out, x)


@pytest.mark.parametrize("dtype, rule", MATRICES)
def test_numbers_that_are_not_finite_stay_where_they_are(dtype: str, rule: str):
    """Alone, together, and in a block without another number; the others come out as without."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((5, 260)).astype(jnp.dtype(dtype))
    x[:, 3] = -0.0
    plain = np.where(np.arange(260) % 50 == 9, np.zeros((), x.dtype), x)
    odd = plain.copy()
    places = np.arange(9, 260, 50)
    for row, words in enumerate([[np.nan], [np.inf], [-np.inf], [np.nan, np.inf, -np.inf]]):
        odd[row, places] = np.resize(words, len(places))
    odd[4, 128:256] = np.inf
    quantize, dequantize = programs(dtype, rule)
    codes, scales = map(np.asarray, quantize(odd))
    want_codes, want_scales = from_definition(odd, rule)
    assert_equal_bits(codes, want_codes)
    assert_equal_bits(scales, want_scales)
    out, want = (np.asarray(a).astype(np.float32) for a in (dequantize(codes, scales), odd))
    usual = np.asarray(dequantize(*quantize(plain))).astype(np.float32)
    finite = np.isfinite(want)
    assert not finite.all() and (scales < 0).any() and (scales > 0).any()
    np.testing.assert_array_equal(out[~finite], want[~finite])
    np.testing.assert_array_equal(out[:4][finite[:4]], usual[:4][finite[:4]])
    rows = wire.hand_over(codes, scales)
    handed = np.asarray(rows.dequantize(dtype)).astype(np.float32)
    assert (np.asarray(rows.scales) == np.abs(scales)).all()
    np.testing.assert_array_equal(handed, np.where(finite, out, np.nan))


def test_bytes_of_a_row():
    assert [wire.row_bytes(dim) for dim in (1, 128, 129, 7168)] == [5, 132, 137, 7392]
