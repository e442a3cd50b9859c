"""The examples' transformer: causality, the decoding cache, schedules, sampling."""

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import END, VOCAB_SIZE, make_model, random_tokens
from flax import nnx
from test_compiled import STRAY, collectives, targets

import attention
from attention import rope
from generate import Generator, check_fits
from model import Transformer, make_group, split_model
from presets import PRESETS, ModelConfig, SettingsError, TrainConfig
from runtime import make_mesh
from sampling import SamplingConfig, allowed, sample
from training import make_optimizer, make_schedule

CONFIG = dataclasses.replace(PRESETS["tiny"].model, dtype="float32")
LATENT = dataclasses.replace(PRESETS["tiny-latent"].model, dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax is not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def logits_of(model: Transformer, tokens: np.ndarray, **options: Any) -> np.ndarray:
    return np.asarray(nnx.jit(lambda m, t: m(t, **options).logits)(model, jnp.asarray(tokens)))


def test_fp8_wire_changes_the_logits_a_little() -> None:
    tokens = random_tokens(4, 32)
    plain, fp8 = (
        logits_of(make_model(dataclasses.replace(CONFIG, fp8_wire=on), 2), tokens)
        for on in (False, True)
    )
    assert (plain != fp8).any()
    assert np.corrcoef(plain.ravel(), fp8.ravel())[0, 1] > 0.95


def test_rope_depends_on_distance_alone() -> None:
    key = jax.random.key(0)
    query, key_ = (jax.random.normal(k, (1, 1, 1, 16)) for k in jax.random.split(key))

    def score(i: int, j: int) -> float:
        turned = [rope(x, jnp.full((1, 1), p), 1e4) for x, p in ((query, i), (key_, j))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(9, 3)) > 1e-3
    np.testing.assert_array_equal(rope(query, jnp.zeros((1, 1), jnp.int32), 1e4), query)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, tie_embeddings=False, num_kv_heads=2, num_dense_layers=0),
        LATENT,
    ],
    ids=["tied", "untied", "latent"],
)
def test_no_token_sees_a_later_one(config: ModelConfig) -> None:
    model = make_model(config, num_devices=1)
    tokens = random_tokens(2, 12)
    changed = tokens.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % VOCAB_SIZE
    before, after = logits_of(model, tokens), logits_of(model, changed)
    assert before.shape == (2, 12, VOCAB_SIZE)
    assert before.dtype == np.float32
    np.testing.assert_allclose(after[:, :8], before[:, :8], rtol=1e-5, atol=1e-5)
    assert np.abs(after[:, 8:] - before[:, 8:]).max() > 0.1


@pytest.mark.parametrize("config", [CONFIG, LATENT], ids=["grouped", "latent"])
def test_cached_calls_equal_the_whole(config: ModelConfig) -> None:
    model = make_model(config, num_devices=2)
    tokens = random_tokens(2, 12)
    whole = logits_of(model, tokens)
    caches = model.empty_caches(2, 16)
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        positions = jnp.broadcast_to(jnp.arange(start, end, dtype=jnp.int32), (2, end - start))
        call = nnx.jit(lambda m, t, p, c: m(t, positions=p, caches=c)[::2])
        logits, caches = call(model, jnp.asarray(tokens[:, start:end]), positions, caches)
        parts.append(np.asarray(logits))
    # Calls of other shapes sum in other orders.
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)


def test_remat_changes_no_gradient() -> None:
    tokens = jnp.asarray(random_tokens(2, 12))
    grads = []
    for remat in (False, True):
        model = make_model(dataclasses.replace(CONFIG, remat=remat), num_devices=1)
        graphdef, params, router = split_model(model)

        def loss(params: nnx.State, graphdef: Any = graphdef, router: Any = router) -> jax.Array:
            return jnp.mean(nnx.merge(graphdef, params, router)(tokens).logits ** 2)

        grads.append(jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
    for kept, computed_again in zip(*grads, strict=True):
        np.testing.assert_allclose(computed_again, kept, rtol=1e-4, atol=1e-6)


def _generator(
    model: Transformer, prompts: list[np.ndarray], num_new: int, sampling: SamplingConfig
) -> Generator:
    graphdef, params, router = split_model(model)
    return Generator(
        graphdef,
        (params, router),
        prompts,
        mesh=model.mesh,
        end_of_text=END,
        max_new_tokens=num_new,
        sampling=sampling,
    )


def test_decoding_exchanges_rows_by_our_calls_alone() -> None:
    """Prefill and loop each have a dispatch and a combine per MoE layer, and nothing like them."""
    model = make_model(CONFIG, num_devices=4)
    prompts = [random_tokens(1, 5)[0]] * 4
    generator = _generator(model, prompts, 8, SamplingConfig(temperature=0.0))
    hlo = generator.lower().compile().as_text()
    num_calls = 2 * (CONFIG.num_layers - CONFIG.num_dense_layers)
    assert targets(hlo) == {"jaxmoe_dispatch": num_calls, "jaxmoe_combine": num_calls}
    assert not collectives(hlo) & set(STRAY)


def test_rows_stop_at_end_of_text() -> None:
    model = make_model(CONFIG, num_devices=2)
    # Its logit is the product with its embedding, so that a long one makes it likely.
    embedding = model.embed.embedding
    embedding[...] = embedding[...].at[END].mul(1.7)
    prompts = [random_tokens(1, length)[0] for length in (3, 8, 5)]
    generator = _generator(model, prompts, 24, SamplingConfig(temperature=1.0, seed=1))
    tokens = generator.generate()
    ends = [list(row).index(END) for row in tokens if END in row]
    assert ends
    for row in tokens:
        after = row[list(row).index(END) :] if END in row else []
        assert all(token == END for token in after)


def test_sampled_text_does_not_depend_on_the_batch() -> None:
    model = make_model(CONFIG, num_devices=1)
    prompts = [random_tokens(1, length)[0] for length in (3, 8, 5)]
    config = SamplingConfig(temperature=1.0, top_k=20, top_p=0.9, seed=5)
    tokens = _generator(model, prompts, 12, config).generate()
    fewer = _generator(model, prompts[:2], 12, config).generate()
    np.testing.assert_array_equal(tokens[:2], fewer)


def test_prompt_beyond_the_context_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"prompt 1 has 30 tokens; .*context of 32\. Use --max"):
        check_fits([np.zeros(4), np.zeros(30)], 3, 32)
    with pytest.raises(SettingsError, match="Shorten the prompt"):
        check_fits([np.zeros(40)], 3, 32)
    with pytest.raises(SettingsError, match="prompt 0 is empty"):
        check_fits([np.zeros(0)], 3, 32)


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    probabilities = jnp.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
    logits = jnp.log(probabilities)

    def kept(**options: Any) -> list[list[int]]:
        mask = np.asarray(allowed(SamplingConfig(**options), logits))
        return [np.flatnonzero(row).tolist() for row in mask]

    assert kept() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(top_k=2)[0] == [1, 3]
    assert kept(top_p=0.65) == [[1, 3], [0]]
    assert kept(top_p=0.75)[0] == [1, 2, 3]
    assert kept(top_p=1e-6) == [[1], [0]]
    # top-p counts within what top-k leaves: 0.4 / 0.7 is more than a half.
    assert kept(top_k=2, top_p=0.5)[0] == [1]


def test_sampling_follows_the_probabilities() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    draws = jax.vmap(lambda step: sample(SamplingConfig(1.0, top_k=3), logits, step)[0])
    counts = np.bincount(np.asarray(draws(jnp.arange(9000))), minlength=4)
    # Four standard deviations of a count.
    np.testing.assert_allclose(counts, [0, 4000, 2000, 3000], atol=4 * 47)
    other = jax.vmap(lambda s: sample(SamplingConfig(1.0, top_k=3, seed=1), logits, s)[0])
    assert not np.array_equal(draws(jnp.arange(100)), other(jnp.arange(100)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_sampling_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SamplingConfig(**options)


def test_schedule_warms_up_and_decays() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_lr_fraction=0.1)
    rates = [float(make_schedule(config)(step)) for step in range(101)]
    np.testing.assert_allclose(np.diff(rates[:11]), np.diff(rates[:11])[0], rtol=1e-5)
    assert rates[0] > 0
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    optimizer = make_optimizer(TrainConfig(warmup_steps=0, learning_rate=0.5, weight_decay=0.1))
    params = {"scale": jnp.full(4, 2.0), "kernel": jnp.full((4, 4), 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["scale"], 0.0)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        ({"head_dim": 15}, "must be even"),
        ({"num_dense_layers": 9}, "num_dense_layers"),
        ({"top_k": 17}, r"top_k \(17\) must be from 1 to num_experts \(16\)"),
        ({"num_groups": 3}, r"num_groups \(3\) must divide num_experts \(16\)"),
        ({"num_groups": 8, "top_groups": 9}, r"top_groups \(9\) must be from 1"),
        ({"num_groups": 8}, r"top_k \(4\) is more than 1 groups have"),
    ],
)
def test_bad_models_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ModelConfig(**options)


def test_settings_that_do_not_fit_the_devices_are_errors() -> None:
    with pytest.raises(SettingsError, match=r"9 wanted, but .* 8 \(cpu\)\. Pass --devices 8"):
        make_mesh(9, 1)
    with pytest.raises(SettingsError, match=r"data_parallel \(3\) must divide the 8 devices"):
        make_mesh(8, 3)
    config = ModelConfig(num_experts=12)
    with pytest.raises(SettingsError, match=r"num_experts \(12\) must be divisible by the 8"):
        make_group(config, make_mesh(8, 1), max_tokens=8)
    with pytest.raises(SettingsError, match=r"transport.*p2p"):
        make_group(CONFIG, make_mesh(8, 1), max_tokens=8, transport="p2p")


@pytest.mark.parametrize(
    "platform, capability, dtype, head_dim, wanted",
    [
        ("cpu", "", jnp.bfloat16, 128, None),
        ("gpu", "9.0", jnp.bfloat16, 128, "cudnn"),
        ("gpu", "8.0", jnp.float16, 64, "cudnn"),
        ("gpu", "7.5", jnp.float16, 64, None),
        ("gpu", "gfx942", jnp.bfloat16, 128, None),
        ("gpu", "9.0", jnp.float32, 128, None),
        ("gpu", "9.0", jnp.bfloat16, 132, None),
    ],
)
def test_cudnn_attends_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    capability: str,
    dtype: jnp.dtype,
    head_dim: int,
    wanted: str | None,
) -> None:
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention.fused_implementation(dtype, head_dim) == wanted
