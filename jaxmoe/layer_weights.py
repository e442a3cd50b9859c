"""A MoE layer's weights as it computes with them."""

from __future__ import annotations

from typing import Any

from jaxmoe.block_quantized import BlockQuantizedExperts, quantize_blocks
from jaxmoe.layer_config import MoEConfig
from jaxmoe.quantized import QuantizedExperts

EXPERTS = ("gate", "up", "down")


def as_computed(config: MoEConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Floats in the group's dtype, or those of experts in `config.expert_dtype`.

    Raises:
      ValueError: rows in FP8 and experts in floats, or weights that cannot be had in expert_dtype.
    """
    group = config.group
    weights = {name: _cast(p, group.dtype) for name, p in params.items()}
    if config.expert_dtype is not None:
        weights |= {name: _in_fp8(weights[name]) for name in EXPERTS}
    if group.rows_dtype is not None and not isinstance(weights["gate"], BlockQuantizedExperts):
        raise ValueError(
            f"MoE: the group hands rows over in {group.rows_dtype.name} (rows_dtype), but the "
            f"layer's experts compute in {group.dtype.name}. Quantise them (`jaxmoe.compress."
            "quantize_layer(moe, 'fp8_blocks')`, or expert_dtype), or make the group without "
            "rows_dtype; wire_dtype alone sends tokens in FP8."
        )
    return weights


def _cast(param: Any, dtype: Any) -> Any:
    quantized = isinstance(param, QuantizedExperts | BlockQuantizedExperts)
    return param if quantized else param.astype(dtype)


def _in_fp8(weight: Any) -> BlockQuantizedExperts:
    """Quantised for this step; gradients go to the floats."""
    if isinstance(weight, QuantizedExperts):
        raise ValueError(
            f"MoE: expert_dtype is float8_e4m3fn, but the weights are {weight.dtype} with a scale "
            "for each channel. Leave expert_dtype None, or quantise them as 'fp8_blocks'."
        )
    done = isinstance(weight, BlockQuantizedExperts)
    return weight if done else quantize_blocks(weight, keep_master=True)
