"""The compressions applied to `jaxmoe.MoE`: each makes a new layer that shares the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.block_quantized import BlockQuantizedExperts
from jaxmoe.compress.checks import EXPERTS
from jaxmoe.compress.merge import MergedExperts
from jaxmoe.compress.quantize import quantize_experts
from jaxmoe.compress.sharing import share_up
from jaxmoe.group import ExpertParallel
from jaxmoe.layer_config import MoEConfig, param_specs
from jaxmoe.nnx import BlockQuantizedArray, ExpertMapArray, MoE, QuantizedArray, _metadata
from jaxmoe.quantized import QuantizedExperts


def quantize_layer(moe: MoE, dtype: str) -> MoE:
    """The layer with eight-bit experts, for decoding; router and shared experts stay as they are.

    Args:
      moe: a trained layer; it keeps its weights.
      dtype: "int8", "fp8" or "fp8_blocks", see `quantize_experts`.

    Raises:
      ValueError: as `quantize_experts`.
    """
    small = quantize_experts(moe.expert_weights, dtype)
    new = _copy(moe)
    for name, spec in param_specs(moe.config).items():
        if name in EXPERTS:
            metadata = _metadata(moe.config.group, spec.sharding)
            values, scales = small[name].values, small[name].scales
            blocks = isinstance(small[name], BlockQuantizedExperts)
            kind = BlockQuantizedArray if blocks else QuantizedArray
            setattr(new, name, nnx.data(kind(values, **metadata)))
            setattr(new, f"{name}_scales", nnx.data(kind(scales, **metadata)))
    return new


def merge_layer(moe: MoE, merged: MergedExperts, group: ExpertParallel) -> MoE:
    """The layer with merged experts; its router chooses among all of them as before.

    Args:
      moe: the trained layer, of one slot for each expert; it keeps its weights.
      merged: from `merge_experts` of this layer's `expert_weights`.
      group: like the layer's, with `num_experts` = E', what merging left.

    Raises:
      ValueError: a layer with replicas or merged already, a merging of another layer, a group of
        another mesh or other sizes.
    """
    config = moe.config
    old, new_spec = config.group.spec, group.spec
    if config.num_experts is not None:
        raise ValueError(
            f"`merge_layer`: the layer has {old.num_experts} slots for {config.num_held_experts} "
            "experts. Merge a layer of one slot for each expert; give it replicas afterwards."
        )
    shapes = {name: w.shape[1:] for name, w in moe.expert_weights.items()}
    if (
        merged.num_experts != old.num_experts
        or {name: w.shape[1:] for name, w in merged.weights.items()} != shapes
    ):
        raise ValueError(
            f"`merge_layer`: merged are {merged.num_experts} experts of "
            f"{list(merged.weights['gate'].shape[1:])}, the layer has {old.num_experts} of "
            f"{list(shapes['gate'])}. Merge this layer's `expert_weights`."
        )
    if group.mesh != config.group.mesh or new_spec.num_experts != merged.num_merged:
        raise ValueError(
            f"`merge_layer`: group has {new_spec.num_experts} experts on {group.mesh}; wanted "
            f"{merged.num_merged} on the layer's mesh {config.group.mesh}. Make an ExpertParallel "
            "like the layer's with that many."
        )
    changed = dataclasses.replace(
        config,
        group=group,
        num_experts=merged.num_experts,
        num_merged_experts=merged.num_merged,
    )
    new = _with_weights(moe, changed, merged.weights)
    of = _put(merged.expert_map, group, (None,))
    new.expert_map = nnx.data(ExpertMapArray(of, **_metadata(group, (None,))))
    return new


def share_layer(moe: MoE, counts: Any = None) -> MoE:
    """The layer with one up projection for all experts (`share_up`), to train on with.

    Args:
      moe: the trained layer, of one slot for each expert; it keeps its weights.
      counts: [E] how often each expert was chosen; None: equally.

    Raises:
      ValueError: a layer with replicas, or sizes and counts that do not fit.
    """
    config = moe.config
    if config.num_held_experts != config.group.num_experts:
        raise ValueError(
            f"`share_layer`: the layer has {config.group.num_experts} slots for "
            f"{config.num_held_experts} experts. Share first; give it replicas afterwards."
        )
    weights = share_up(_fetched(moe, "share_layer"), counts)
    return _with_weights(moe, dataclasses.replace(config, shared_up=True), weights)


def _fetched(moe: MoE, name: str) -> dict[str, Any]:
    weights = moe.expert_weights
    if any(isinstance(w, QuantizedExperts | BlockQuantizedExperts) for w in weights.values()):
        raise ValueError(f"`{name}`: the layer's weights are quantised. Do that last.")
    return weights


def _with_weights(moe: MoE, config: MoEConfig, weights: dict[str, Any]) -> MoE:
    """A layer of another configuration, with other float expert weights."""
    new = _copy(moe)
    new.config = config
    specs = param_specs(config)
    for name in EXPERTS:
        value = _put(weights[name], config.group, specs[name].sharding)
        setattr(new, name, nnx.Param(value, **_metadata(config.group, specs[name].sharding)))
    return new


def _put(array: Any, group: ExpertParallel, sharding: tuple[Any, ...]) -> jax.Array:
    """The host's array on the devices of the group."""
    if group.mesh is None:
        return jnp.asarray(array)
    place = jax.sharding.NamedSharding(group.mesh, jax.sharding.PartitionSpec(*sharding))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _copy(moe: MoE) -> MoE:
    """Another layer of the same arrays."""
    graphdef, state = nnx.split(moe)
    return nnx.merge(graphdef, state)


def num_bytes(weights: Any) -> int:
    """Bytes of all arrays of a tree of weights, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
