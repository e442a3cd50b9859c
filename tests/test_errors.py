"""Every bad input is refused with a sentence that says what was got, wanted and what to do."""

from __future__ import annotations

from typing import Any

import cases
import dense
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Config
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import jaxmoe
from jaxmoe.layer_config import MoEConfig
from jaxmoe.routing import RouterConfig

SIZES = dict(num_experts=8, top_k=2, dim=4, max_tokens=6, dtype="float32")


def mesh_of(*shape: int, names: tuple[str, ...] = ("expert",)) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def group_of(mesh: Any = None, **changes: Any) -> jaxmoe.ExpertParallel:
    return jaxmoe.ExpertParallel(mesh, **{**SIZES, **changes})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(num_experts=10), r"num_experts \(10\) must be divisible by the 4 devices of mesh "
         r"axis 'expert'. Use 8 or 12 experts, or that many devices: 1, 2, 5, 10"),
        (dict(num_experts=0), "num_experts must be an integer of at least 1, got 0"),
        (dict(num_experts=8.0), "num_experts must be an integer of at least 1, got 8.0"),
        (dict(top_k=0), "top_k must be an integer of at least 1, got 0"),
        (dict(top_k=True), "top_k must be an integer of at least 1, got True"),
        (dict(top_k=9), r"top_k \(9\) is more than num_experts \(8\).*lower top_k"),
        (dict(dim=0), "dim must be an integer of at least 1, got 0"),
        (dict(max_tokens=-1), "max_tokens must be an integer of at least 0, got -1"),
        (dict(max_tokens=2**29), "do not fit 32-bit indices. Lower max_tokens"),
        (dict(capacity_factor=0.0), "capacity_factor must be a positive number or None, got 0.0"),
        (dict(capacity_factor=-1.0), "capacity_factor must be a positive number or None, got -1"),
        (dict(capacity_factor=float("nan")), "capacity_factor must be a positive number.*got nan"),
        (dict(capacity_factor=float("inf")), "capacity_factor must be a positive number.*got inf"),
        (dict(timeout=0), "timeout must be a positive number of seconds, got 0"),
        (dict(timeout=float("inf")), "timeout must be a positive number of seconds, got inf"),
        (dict(dtype="int8"), "dtype must be one of bfloat16, float16, float32, got int8"),
        (dict(dtype="float64"), "dtype must be one of bfloat16, float16, float32, got float64"),
        (dict(mode="fast"), "mode must be one of 'auto', 'throughput', 'low_latency', got 'fast'"),
        (dict(mode="low_latency", max_tokens=2049), r"mode 'low_latency' takes at most 2048 tokens "
         r"per device in a group of 4 devices with top_k=2, got max_tokens=2049. Lower max_tokens"),
        (dict(num_sms=8), r"num_sms \(8\) bounds GPU kernels.*Leave it None"),
        (dict(transport="nvlink"), "transport must be one of 'auto', 'cpu', .*got 'nvlink'"),
        (dict(axis="model"), r"axis 'model' is not in the mesh, whose axes are \('expert',\)"),
        (dict(axis=()), r"axis \(\) is not in the mesh"),
        (dict(axis=("expert", "expert")), "names a mesh axis twice. Name each once"),
    ],
    ids=lambda v: "-".join(map(str, v.items())) if isinstance(v, dict) else "",
)  # fmt: skip
def test_group(changes: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=rf"^ExpertParallel: .*{sentence}"):
        group_of(mesh_of(4), **changes)


def test_group_of_no_mesh():
    with pytest.raises(ValueError, match=r"mesh must be a jax.sharding.Mesh or None, got list"):
        group_of([1, 2])


def sds(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD = dict(x=sds(3, 4), ids=sds(3, 2, dtype=jnp.int32), weights=sds(3, 2))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(x=sds(3, 5)), r"x must have shape \[T, 4\], got \[3, 5\]"),
        (dict(x=sds(3)), r"x must have shape \[T, 4\], got \[3\]"),
        (dict(x=sds(3, 4, dtype=jnp.bfloat16)), r"x must be float32, got bfloat16. Cast it with "
         r"x.astype\(jnp.float32\), or make the group with that dtype"),
        (dict(ids=sds(2, 2, dtype=jnp.int32)), r"expert_ids must have shape \[3, 2\], got \[2, 2"),
        (dict(ids=sds(3, 3, dtype=jnp.int32)), r"expert_ids must have shape \[3, 2\], got \[3, 3"),
        (dict(ids=sds(3, 2)), "expert_ids must be int32, got float32. Cast it"),
        (dict(ids=sds(3, 2, dtype=jnp.uint32)), "expert_ids must be int32, got uint32"),
        (dict(weights=sds(3, 1)), r"weights must have shape \[3, 2\], got \[3, 1\]"),
        (dict(weights=sds(3, 2, dtype=jnp.float16)), "weights must be float32, got float16"),
        (dict(x=sds(7, 4), ids=sds(7, 2, dtype=jnp.int32), weights=sds(7, 2)),
         "got 7 tokens per device, but the group was made with max_tokens=6. Make the group"),
    ],
)  # fmt: skip
def test_dispatch(changes: dict[str, Any], sentence: str):
    group = group_of()
    with pytest.raises(ValueError, match=f"^dispatch: {sentence}"):
        jax.eval_shape(
            lambda x, ids, weights: jaxmoe.dispatch(group, x, ids, weights), **{**GOOD, **changes}
        )


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(rows=sds(5, 4)), r"expert_rows must have shape \[6, 4\], got \[5, 4\]"),
        (dict(rows=sds(6, 4, dtype=jnp.float16)), "expert_rows must be float32, got float16"),
        (dict(weights=sds(6, 1)), r"row_weights must have shape \[6\], got \[6, 1\]"),
        (dict(weights=sds(6, dtype=jnp.bfloat16)), "row_weights must be float32, got bfloat16"),
        (dict(plan=sds(6)), "plan must be the Plan that dispatch returned, got"),
    ],
)
def test_combine(changes: dict[str, Any], sentence: str):
    group = group_of()
    rows, weights, plan = jax.eval_shape(
        lambda x, ids, weights: jaxmoe.dispatch(group, x, ids, weights), **GOOD
    )
    arguments = {"rows": rows, "weights": weights, "plan": plan, **changes}
    with pytest.raises(ValueError, match=f"^combine: {sentence}"):
        jax.eval_shape(
            lambda rows, weights, plan: jaxmoe.combine(group, rows, weights, plan), **arguments
        )


def test_plan_of_another_group():
    first, second = group_of(), group_of(top_k=3)
    dispatch = lambda x, ids, weights: jaxmoe.dispatch(first, x, ids, weights)  # noqa: E731
    out = jax.eval_shape(dispatch, **GOOD)
    with pytest.raises(
        ValueError,
        match=r"combine: the plan is of a group with 1 devices and top_k=2, this group has 1 and "
        r"3. Pass the group that made the plan",
    ):
        jax.eval_shape(lambda *a: jaxmoe.combine(second, *a), *out)


def test_not_a_group():
    with pytest.raises(ValueError, match=r"^dispatch: the first argument must be an"):
        jaxmoe.dispatch(None, *(jnp.zeros(v.shape, v.dtype) for v in GOOD.values()))


def call(group: jaxmoe.ExpertParallel, mesh: Any, **options: Any) -> Any:
    """Dispatch with T = 3 per device under a shard_map, or without one where mesh is None."""
    body = lambda *a: jaxmoe.dispatch(group, *a)[0]  # noqa: E731
    num = 1 if mesh is None else mesh.size
    arrays = [np.zeros((num * v.shape[0], *v.shape[1:]), v.dtype) for v in GOOD.values()]
    if mesh is not None:
        spec = PartitionSpec(options.pop("spec", mesh.axis_names))
        body = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, **options)
    return jax.jit(body), arrays


def test_outside_shard_map():
    program, arrays = call(group_of(mesh_of(4)), None)
    sentence = "belongs to a mesh of axes {'expert': 4}, but there is no mesh here. Call it inside"
    with pytest.raises(ValueError, match=sentence):
        program(*arrays)


@pytest.mark.parametrize(
    "mesh, got",
    [
        ((2,), "{'expert': 2}"),
        ((2, 4), "{'data': 2, 'expert': 4}"),
    ],
)
def test_group_of_another_mesh(mesh: tuple[int, ...], got: str):
    other = mesh_of(*mesh, names=("data", "expert")[-len(mesh) :])
    program, arrays = call(group_of(mesh_of(4)), other)
    with pytest.raises(ValueError, match=f"axes {{'expert': 4}}, but the mesh here is {got}"):
        program(*arrays)


def test_partly_manual_shard_map():
    mesh = mesh_of(2, 4, names=("data", "expert"))
    program, arrays = call(group_of(mesh), mesh, axis_names={"expert"}, spec=("expert",))
    sentence = r"manual over every axis of the group's mesh; here \['data'\] are not.*axis_names"
    with pytest.raises(ValueError, match=sentence):
        program(*arrays)


def test_closed_group_at_trace_time():
    group = group_of(mesh_of(4))
    group.close()
    group.close()  # twice is no error
    program, arrays = call(group, group.mesh)
    with pytest.raises(ValueError, match=r"closed.*was closed. Make a new group"):
        program(*arrays)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("with_mesh", [True, False])
def test_closed_group_at_run_time(with_mesh: bool):
    """A program that was compiled before: an error from every device, no hang, no crash."""
    group = group_of(mesh_of(4) if with_mesh else None, transport="cpu")
    program, arrays = call(group, group.mesh)
    jax.block_until_ready(program(*arrays))
    group.close()
    # On a single device JAX raises a failed precondition as a ValueError.
    error = jax.errors.JaxRuntimeError if with_mesh else ValueError
    with pytest.raises(error, match=r"uses a group that was closed. Keep the ExpertParallel alive"):
        jax.block_until_ready(program(*arrays))
    # Other groups go on.
    program, arrays = call(group_of(mesh_of(4), transport="cpu"), group.mesh or mesh_of(4))
    jax.block_until_ready(program(*arrays))


CONFIG = Config(T=4, D=4, mesh="data_expert")


@pytest.mark.parametrize(
    "x, mask, sentence",
    [
        (sds(8, 5), None, r"x must have shape \[..., 4\] with at least two dimensions, got \[8, 5"),
        (sds(4), None, r"x must have shape \[..., 4\] with at least two dimensions, got \[4\]"),
        (sds(12, 4), None, r"first dimension of x \(12\) must be a multiple of the 8 devices of "
         r"mesh axes \('data', 'expert'\).*Pad the batch"),
        (sds(8, 2, 4), sds(8, dtype=bool), r"mask must have shape \[8, 2\], got \[8\]"),
        (sds(8, 5, 4), None, "got 5 tokens per device, but the group was made with max_tokens=4"),
    ],
)  # fmt: skip
def test_layer(x: Any, mask: Any, sentence: str):
    layer = dense.abstract_layer(CONFIG)
    with pytest.raises(ValueError, match=sentence):
        nnx.eval_shape(lambda layer, x, mask: layer(x, mask=mask), layer, x, mask)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(token_axes=("data",)), r"token_axes \('data',\) must be axes of the group's mesh "
         r"\('data', 'expert'\) and include its expert axis"),
        (dict(token_axes=("model", "expert")), r"token_axes \('model', 'expert'\) must be axes"),
        (dict(hidden_dim=0), "hidden_dim must be at least 1, got 0"),
        (dict(num_shared_experts=-1), "num_shared_experts must be at least 0, got -1"),
        (dict(group=None), "group must be an ExpertParallel, got NoneType"),
    ],
)  # fmt: skip
def test_layer_options(options: dict[str, Any], sentence: str):
    group = exchange.make_group(CONFIG, "cpu")
    with pytest.raises(ValueError, match=f"^MoE: {sentence}"):
        MoEConfig(**{"group": group, "hidden_dim": 4, **options})


def test_update_of_a_bias_that_is_not_there():
    layer = dense.abstract_layer(CONFIG)
    with pytest.raises(ValueError, match=r"this layer has no bias. Make it with use_bias=True"):
        layer.update_bias(None, 0.1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_in_a_token_reaches_its_output_only(score: str):
    """Documented for `route`: the token's weights become NaN; nobody else's output changes."""
    config = dense.layer_config("data_expert")
    layer = dense.abstract_layer(config, router=RouterConfig(score=score))
    graphdef, state = nnx.split(layer)
    model = nnx.merge(graphdef, dense.with_params(state, dense.make_params(state)))
    program = jax.jit(lambda x: model(x)[0])
    x = dense.make_tokens(config)
    bad = x.copy()
    bad[3, 1, 2] = np.nan
    good_y, bad_y = (
        np.asarray(program(exchange.place(config, cases.slices_first(config, a)))) for a in (x, bad)
    )
    here = np.zeros(x.shape[:2], bool)
    here[3, 1] = True
    assert np.isnan(bad_y[here]).all()
    np.testing.assert_allclose(bad_y[~here], good_y[~here], rtol=1e-6, atol=1e-6)
