"""The contract of dispatch and combine, written out in loops over Python numbers and NumPy arrays.

Independent of `jaxmoe.reference`: it shares no code with it and follows another way of counting.
Each function takes one slice: arrays [R, ...] of all devices of the expert axis.
"""

from __future__ import annotations

from typing import Any

import fp8
import numpy as np
from cases import Config

Arrays = dict[str, np.ndarray]


def kept_choices(c: Config, ids: np.ndarray, device: int) -> tuple[list[Any], int]:
    """Choices (s, t, k) that `device` keeps, in the order of its rows, and how many it drops."""
    wanted = [
        (k, t, s)
        for s in range(c.R)
        for t in range(c.T)
        for k in range(c.K)
        if device * c.L <= ids[s, t, k] < (device + 1) * c.L
    ]
    kept = sorted(wanted)[: c.C]
    rows = sorted((int(ids[s, t, k]), s, t, k) for k, t, s in kept)
    return [(s, t, k) for _, s, t, k in rows], len(wanted) - len(kept)


def dispatch(c: Config, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Arrays:
    """Rows, row weights and every field of the plan; [R, ...] each."""
    if c.wire is not None:
        x = fp8.there_and_back(x, c.wire)
    out: Arrays = {
        "rows": np.zeros((c.R, c.C, c.D), x.dtype),
        "row_weights": np.zeros((c.R, c.C), np.float32),
        "group_sizes": np.zeros((c.R, c.L), np.int32),
        "num_rows": np.zeros(c.R, np.int32),
        "num_dropped": np.zeros(c.R, np.int32),
        "num_invalid": np.zeros(c.R, np.int32),
        "row_map": np.full((c.R, c.R, c.T, c.K), -1, np.int32),
        "row_source": np.full((c.R, c.C), -1, np.int32),
        "choice_device": np.full((c.R, c.T, c.K), -1, np.int32),
    }
    for d in range(c.R):
        choices, out["num_dropped"][d] = kept_choices(c, ids, d)
        out["num_rows"][d] = len(choices)
        for r, (s, t, k) in enumerate(choices):
            out["rows"][d, r] = x[s, t]
            out["row_weights"][d, r] = weights[s, t, k]
            out["group_sizes"][d, ids[s, t, k] - d * c.L] += 1
            out["row_map"][d, s, t, k] = r
            out["row_source"][d, r] = (s * c.T + t) * c.K + k
        for t in range(c.T):
            for k in range(c.K):
                if 0 <= ids[d, t, k] < c.E:
                    out["choice_device"][d, t, k] = ids[d, t, k] // c.L
                elif ids[d, t, k] != -1:
                    out["num_invalid"][d] += 1
    return out


def combine(c: Config, ids: np.ndarray, rows: np.ndarray, row_weights: np.ndarray) -> np.ndarray:
    """`y[t] = sum of weight * row` over the kept choices, in float64; [R, T, D]."""
    y = np.zeros((c.R, c.T, c.D), np.float64)
    for d in range(c.R):
        for r, (s, t, _) in enumerate(kept_choices(c, ids, d)[0]):
            y[s, t] += row_weights[d, r].astype(np.float64) * rows[d, r].astype(np.float64)
    return y


def dispatch_grad(
    c: Config, ids: np.ndarray, d_rows: np.ndarray, d_row_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """d_x [R, T, D] and d_weights [R, T, K]: each kept choice adds its row's cotangents."""
    d_x = combine(c, ids, d_rows, np.ones_like(d_row_weights))
    d_weights = np.zeros((c.R, c.T, c.K), np.float32)
    for d in range(c.R):
        for r, (s, t, k) in enumerate(kept_choices(c, ids, d)[0]):
            d_weights[s, t, k] = d_row_weights[d, r]
    return d_x, d_weights


def combine_grad(
    c: Config, ids: np.ndarray, d_y: np.ndarray, rows: np.ndarray, row_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """d_expert_rows [R, C, D] and d_row_weights [R, C], in float64; zero where no choice is."""
    d_rows = np.zeros((c.R, c.C, c.D), np.float64)
    d_row_weights = np.zeros((c.R, c.C), np.float64)
    for d in range(c.R):
        for r, (s, t, _) in enumerate(kept_choices(c, ids, d)[0]):
            token = d_y[s, t].astype(np.float64)
            d_rows[d, r] = row_weights[d, r] * token
            d_row_weights[d, r] = np.dot(token, rows[d, r].astype(np.float64))
    return d_rows, d_row_weights


def rounded_combine(
    c: Config, ids: np.ndarray, rows: np.ndarray, row_weights: np.ndarray
) -> np.ndarray:
    """`combine` with every rounding of the documented order of summation; in the dtype of rows."""
    place = {
        choice: (d, r) for d in range(c.R) for r, choice in enumerate(kept_choices(c, ids, d)[0])
    }
    y = np.zeros((c.R, c.T, c.D), rows.dtype)
    for s in range(c.R):
        for t in range(c.T):
            total = np.zeros(c.D, np.float32)
            for d in range(c.R):
                partial = np.zeros(c.D, np.float32)
                for k in range(c.K):
                    at = place.get((s, t, k))
                    if at is not None and at[0] == d:
                        partial += row_weights[at] * rows[at].astype(np.float32)
                if d != s:
                    partial = partial.astype(rows.dtype).astype(np.float32)
                total += partial
            y[s, t] = total.astype(rows.dtype)
    return y
