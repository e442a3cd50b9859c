"""Latent attention: its formula, the absorbed form; caches that stay in place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    CONFIGS,
    VOCAB_SIZE,
    cache_copies,
    cache_shape,
    captured,
    make_generator,
    make_model,
)
from flax import nnx

from attention import RMSNorm
from latent_attention import LatentAttention, LatentCache
from model import Transformer, make_group
from presets import PRESETS, ModelConfig, SettingsError
from runtime import make_mesh

LATENT = CONFIGS["latent"]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax is not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# Latent attention


def latent_attention(config: ModelConfig = LATENT) -> tuple[LatentAttention, Any, Any]:
    """A layer with scales that are not all one, and random tokens at the first positions."""
    layer = LatentAttention(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(3))
    for path, module in nnx.iter_modules(layer):
        if isinstance(module, RMSNorm):
            noise = jax.random.uniform(jax.random.key(len(path)), module.scale.shape)
            module.scale[...] = 0.5 + noise
        elif path and hasattr(module, "kernel"):
            module.kernel[...] = module.kernel[...] * 10
    x = jax.random.normal(jax.random.key(4), (2, 9, config.dim))
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    return layer, x, positions


def by_the_docstring(layer: LatentAttention, x: np.ndarray) -> np.ndarray:
    """One row, head and token at a time, in float64."""
    cfg = layer.config
    width, turned, rank = cfg.head_dim, cfg.rope_head_dim, cfg.kv_lora_rank

    def of(module: Any) -> np.ndarray:
        return np.asarray(module.kernel[...], np.float64)

    def norm(module: Any, a: np.ndarray) -> np.ndarray:
        return a / np.sqrt(np.mean(a**2) + 1e-6) * np.asarray(module.scale[...], np.float64)

    def rope(a: np.ndarray, position: int) -> np.ndarray:
        angle = position * cfg.rope_theta ** (-np.arange(turned // 2) / (turned // 2))
        pairs = (a[: turned // 2] + 1j * a[turned // 2 :]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    y = np.zeros((len(x), cfg.num_heads, width))
    latents = [norm(layer.latent_norm, (token @ of(layer.down))[:rank]) for token in x]
    shared = [rope((token @ of(layer.down))[rank:], i) for i, token in enumerate(x)]
    for i, token in enumerate(x):
        if layer.query_down is not None:
            token = norm(layer.query_norm, token @ of(layer.query_down))
        query = (token @ of(layer.query)).reshape(cfg.num_heads, width + turned)
        for n in range(cfg.num_heads):
            head = slice(n * width, (n + 1) * width)
            still, moved = query[n, :width], rope(query[n, width:], i)
            scores = np.array(
                [
                    still @ (latents[j] @ of(layer.key_up)[:, head]) + moved @ shared[j]
                    for j in range(i + 1)
                ]
            )
            weights = np.exp(scores / np.sqrt(width + turned))
            weights /= weights.sum()
            y[i, n] = sum(
                w * (latents[j] @ of(layer.value_up)[:, head]) for j, w in enumerate(weights)
            )
    return y.reshape(len(x), -1) @ of(layer.out)


@pytest.mark.parametrize("query_rank", [None, 24])
def test_latent_attention_is_what_its_docstring_says(query_rank: int | None) -> None:
    layer, x, positions = latent_attention(dataclasses.replace(LATENT, query_lora_rank=query_rank))
    y, cache = layer(x, positions)
    assert cache is None
    want = np.stack([by_the_docstring(layer, np.asarray(row, np.float64)) for row in x])
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.parametrize("num_at_once", [1, 3])
def test_absorbed_attention_equals_the_plain_one(num_at_once: int) -> None:
    layer, x, positions = latent_attention()
    plain, _ = layer(x, positions)
    # Slots after a token may hold anything.
    cache: Any = LatentCache(layer.empty_cache(2, 12).entries + 7)
    for start in range(0, 9, num_at_once):
        at = slice(start, start + num_at_once)
        y, cache = layer(x[:, at], positions[:, at], cache)
        # Rounding of sums in another order.
        np.testing.assert_allclose(y, plain[:, at], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.entries[:, 9:], 7)


def test_a_latent_cache_is_small() -> None:
    config = PRESETS["decode-gpu"].model
    group = make_group(config, make_mesh(1, 1), max_tokens=1, transport="xla")
    model = nnx.eval_shape(lambda: Transformer(config, VOCAB_SIZE, group, rngs=nnx.Rngs(0)))
    (cache,) = set(jax.eval_shape(lambda: model.empty_caches(3, 100)))
    assert cache.entries.shape == (3, 100, 512 + 64)
    grouped = dataclasses.replace(config, attention="grouped")
    assert 2 * grouped.num_kv_heads * grouped.head_dim == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_head_dim": 7}, r"rope_head_dim \(7\) must be even"),
        ({"rope_head_dim": 0}, r"rope_head_dim \(0\) must be at least 1"),
        ({"kv_lora_rank": 0}, r"kv_lora_rank \(0\) must be at least 1"),
        ({"query_lora_rank": 0}, r"query_lora_rank \(0\) must be at least 1"),
    ],
)
def test_bad_latent_models_are_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(LATENT, **options)


# The compiled program


@pytest.mark.parametrize("name", CONFIGS)
def test_the_caches_are_never_copied(name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], context=512, num_heads=4, num_kv_heads=2)
    generator = make_generator(make_model(config, num_devices=2), num_new=400)
    shape = cache_shape(generator)
    whole, steps = generator.lower().compile(), generator.lower_continue().compile()
    for program in (whole, steps):
        hlo = program.as_text()
        assert f"[{','.join(map(str, shape))}]" in hlo
        assert cache_copies(hlo, shape) == []
    # One asks whether all rows are done; none belongs to a step.
    assert len(re.findall(r" all-reduce(?:-start)?\(", steps.as_text())) == 1
    # The step's program returns the buffers of the state that it was given.
    state, _ = jax.eval_shape(generator.begin)
    caches = jax.tree.leaves(state.caches)
    cache_bytes = sum(a.size * a.dtype.itemsize for a in caches) // generator.mesh.size
    memory = steps.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    aliased = re.search(r"input_output_alias=\{(.*?) \}, entry", steps.as_text())
    assert aliased and aliased[1].count("-alias") >= len(caches)
    # Nor is there room for another copy of them.
    assert memory.temp_size_in_bytes < cache_bytes
    begun, _ = generator.begin()
    generator.resume(begun)
    assert all(a.is_deleted() for a in jax.tree.leaves(begun.caches))


def test_a_copy_of_the_cache_would_be_seen() -> None:
    """A loop that still reads the old cache after writing makes a copy in each step."""

    def step(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        cache, total = carry
        new = cache.at[:, 3].set(total)
        return new, total + jnp.sum(jnp.sin(new) * jnp.cos(cache[::-1]))

    def loop(cache: Any) -> Any:
        return jax.lax.fori_loop(0, 5, step, (cache, jnp.float32(1)))

    hlo = jax.jit(loop, donate_argnums=0).lower(jnp.zeros((3, 8, 5))).compile().as_text()
    assert cache_copies(hlo, (3, 8, 5))
    assert not cache_copies(hlo, (3, 8, 6))


# A loop, as XLA dumps it for a GPU.
THUNKS = """\
001: kCopy         [source       | next=003 (2)] kCopy
003: kWhile        [prev=001 (1) | next=008 (1)]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=006 (1)]
        005: kCustomKernel [source       | next=007 (2)] wrapped_convert grid: [61, 1, 1]
        006: kAsyncStart    [prev=005 (1) | next=007 (10)] stream=communication_stream[0]
            007: kCustomCall [source | sink] kCustomCall
    008: kAsyncStart   [prev=005 (1) | next=007 (10)] stream=communication_stream[0]
        009: kCustomCall [source | sink] kCustomCall
010: kCustomKernel [prev=003 (1) | sink        ] loop_add_fusion_6 grid: [1, 1, 1]
"""


def test_calls_outside_of_command_buffers_would_be_seen() -> None:
    """What tests/test_gpu_decode.py looks for on GPUs."""
    inside, outside = captured(THUNKS)
    assert [line.split(":")[0] for line in inside] == ["007"]
    assert [line.split(":")[0] for line in outside] == ["009"]
