"""The compressions applied to `jaxmoe.MoE`: each makes a new layer that shares the rest."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxmoe.compress.quantize import quantize_experts
from jaxmoe.layer import param_specs
from jaxmoe.nnx import MoE, QuantizedArray, _metadata

EXPERTS = ("gate", "up", "down")


def quantize_layer(moe: MoE, dtype: str) -> MoE:
    """The layer with eight-bit experts, for decoding; router and shared experts stay as they are.

    Args:
      moe: a trained layer; it keeps its weights.
      dtype: "int8" or "fp8", see `quantize_experts`.

    Raises:
      ValueError: as `quantize_experts`.
    """
    small = quantize_experts(moe.expert_weights, dtype)
    new = _copy(moe)
    for name, spec in param_specs(moe.config).items():
        if name in EXPERTS:
            metadata = _metadata(moe.config.group, spec.sharding)
            values, scales = small[name].values, small[name].scales
            setattr(new, name, nnx.data(QuantizedArray(values, **metadata)))
            setattr(new, f"{name}_scales", nnx.data(QuantizedArray(scales, **metadata)))
    return new


def _copy(moe: MoE) -> MoE:
    """Another layer of the same arrays."""
    graphdef, state = nnx.split(moe)
    return nnx.merge(graphdef, state)


def num_bytes(weights: Any) -> int:
    """Bytes of all arrays of a tree of weights, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
