"""The FP8 wire format from its definition in `jaxmoe.wire`, block by block in NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
LEAST_SCALE = 2.0**-116


def scale_of(block: np.ndarray, rule: str) -> np.float32:
    """The scale of a block of finite numbers, from its definition."""
    amax = np.float64(np.abs(block.astype(np.float64)).max(initial=0))
    if rule == "amax":
        scale = np.float32(amax) * (np.float32(1) / np.float32(448))
    else:
        scale = 2.0 ** np.ceil(np.log2(amax / 448)) if amax > 0 else 0.0
    return np.float32(max(scale, LEAST_SCALE))


def from_definition(x: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of [T, D] tokens."""
    num_blocks = -(-x.shape[1] // 128)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((len(x), num_blocks), np.float32)
    for t, b in np.ndindex(scales.shape):
        part = slice(128 * b, 128 * b + 128)
        block = x[t, part].astype(np.float32)
        finite = np.isfinite(block)
        scale = scale_of(block[finite], rule)
        with np.errstate(under="ignore"):
            scaled = np.where(finite, block, 0) * (np.float32(1) / scale)
        values = np.clip(scaled, -448, 448).astype(E4M3)
        with np.errstate(over="ignore"):
            too_large = np.isinf((values.astype(np.float32) * scale).astype(x.dtype))
        values = np.where(too_large, E4M3(240), values)
        code = values.view(np.uint8) & 0x7F | np.where(np.signbit(block), 128, 0).astype(np.uint8)
        if not finite.all():
            code[code == 0x80] = 0
            code[block == np.inf], code[block == -np.inf], code[np.isnan(block)] = 0x7F, 0xFF, 0x80
            scale = -scale
        codes[t, part], scales[t, b] = code, scale
    return codes, scales


def exact(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What codes and scales stand for, in float64; NaN in blocks that are not finite."""
    spread = np.repeat(scales, 128, axis=1)[:, : codes.shape[1]].astype(np.float64)
    return np.where(spread > 0, codes.view(E4M3).astype(np.float64) * spread, np.nan)


def there_and_back(x: np.ndarray, rule: str) -> np.ndarray:
    """What finite tokens [..., D] come out as."""
    codes, scales = from_definition(x.reshape(-1, x.shape[-1]), rule)
    return exact(codes, scales).astype(np.float32).astype(x.dtype).reshape(x.shape)
