"""What holds for every routing, whatever the logits, the bias and the mask are."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxmoe import routing as routing_lib
from jaxmoe.routing import RouterConfig

NUM_TOKENS, NUM_EXPERTS, NUM_GROUPS, TOP_K = 6, 8, 4, 3
CONFIGS = [
    RouterConfig(score="sigmoid", scale=2.0, num_groups=NUM_GROUPS, top_groups=2),
    RouterConfig(topk_first=True, scale=2.0, num_groups=NUM_GROUPS, top_groups=2),
]
route = jax.jit(routing_lib.route, static_argnames=("top_k", "config"))
# Few distinct values, so that ties, forbidden experts and broken tokens are common.
value = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]), st.floats(width=32)
)


@settings(max_examples=150, deadline=None)
@given(
    logits=arrays(np.float32, (NUM_TOKENS, NUM_EXPERTS), elements=value),
    bias=arrays(np.float32, NUM_EXPERTS, elements=value),
    mask=arrays(np.bool_, NUM_TOKENS),
    config=st.sampled_from(CONFIGS),
)
def test_every_token_gets_a_valid_choice(logits, bias, mask, config):
    routing = route(logits, TOP_K, config, bias=bias, mask=mask)
    ids, weights, scores = map(np.asarray, routing[:3])
    chosen = ids >= 0
    assert np.all(ids >= -1) and np.all(ids < NUM_EXPERTS)
    np.testing.assert_array_equal(weights[~chosen], 0)
    for token in range(NUM_TOKENS):
        mine = ids[token][chosen[token]]
        allowed = logits[token] != -np.inf
        broken = bool(np.any(np.isnan(logits[token]) | (logits[token] == np.inf)))
        assert len(set(mine)) == len(mine)
        assert len({expert // (NUM_EXPERTS // NUM_GROUPS) for expert in mine}) <= config.top_groups
        if not mask[token] or not np.any(allowed):
            assert len(mine) == 0 and np.all(scores[token] == 0)
        elif broken:
            assert len(mine) == TOP_K and np.all(np.isnan(weights[token]))
        else:
            assert len(mine) >= 1 and np.all(allowed[mine])
            assert len(mine) == TOP_K or not np.all(allowed)
            np.testing.assert_allclose(weights[token].sum(), config.scale, rtol=1e-6)
            np.testing.assert_allclose(scores[token].sum(), 1, rtol=1e-6)


def test_what_was_not_chosen_has_no_share_of_the_weights():
    """Two half-forbidden groups survive, so that only two experts are left for three choices."""
    logits = np.zeros((1, NUM_EXPERTS), np.float32)
    logits[0, [2, 4]] = -np.inf
    bias = np.full(NUM_EXPERTS, -1, np.float32)
    ids, weights, *_ = route(logits, TOP_K, CONFIGS[0], bias=bias)
    np.testing.assert_array_equal(ids, [[3, 5, -1]])
    np.testing.assert_array_equal(weights, [[1, 1, 0]])


@settings(max_examples=50, deadline=None)
@given(
    logits=arrays(np.float32, (NUM_TOKENS, NUM_EXPERTS), elements=value),
    order=st.permutations(range(NUM_TOKENS)),
)
def test_tokens_do_not_see_each_other(logits, order):
    mask = np.ones(NUM_TOKENS, bool)
    bias = np.zeros(NUM_EXPERTS, np.float32)
    routing = route(logits, TOP_K, CONFIGS[0], bias=bias, mask=mask)
    permuted = route(logits[order], TOP_K, CONFIGS[0], bias=bias, mask=mask)
    for whole, part in zip(routing, permuted, strict=True):
        np.testing.assert_array_equal(np.asarray(whole)[order], part)
