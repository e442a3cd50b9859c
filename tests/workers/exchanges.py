"""Dispatch, combine and gradients on all devices of all processes; checks are the functions below.

Started by tests/test_multiprocess.py and tests/test_gpu_processes.py; arguments are the names of
cases. JAXMOE_TEST_TRANSPORT says which transport, "cpu" without it.
"""

import dataclasses
import os
import sys
import time
from typing import Any

import cases
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import spec
from cases import Case, Config
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

RANK = processes.join()
TRANSPORT = os.environ.get("JAXMOE_TEST_TRANSPORT", "cpu")
MODE = os.environ.get("JAXMOE_TEST_MODE", "auto")
# NCCL refuses processes that share a GPU: then there is no transport "xla" to compare with.
NATIVE = not os.environ.get("JAXMOE_TEST_SHARED_GPUS")

cases.CONFIGS |= {
    # Slices of two neighbouring devices, which two devices per process keep within a process.
    "slices_of_two": Config(R=2, T=5, D=9, E=6, K=3, dtype="bfloat16", mesh="data_expert"),
    "two_devices": Config(R=2, T=6, D=5, E=4, K=2, dtype="bfloat16", capacity_factor=0.75),
}
T, D, E, K = 6, 8, 16, 3


def main() -> None:
    if TRANSPORT != "cpu":
        fit_to_gpus()
    for name in sys.argv[1:]:
        timed(check_case, Case(*name.split("-")))
    timed(check_floats, Case(*sys.argv[1].split("-")))
    for check in (
        check_different_numbers_of_tokens,
        check_scan_with_native_collectives,
        check_independent_calls_with_native_collectives,
        check_several_groups,
        check_calls_in_two_halves,
        check_closing_a_group,
    ):
        timed(check)


def fit_to_gpus() -> None:
    """Widths that the kernels take, and meshes of all devices there are."""
    num = jax.device_count()
    for name, c in cases.CONFIGS.items():
        step = 8 if c.wire is None else 16
        dim = -(-c.D // step) * step
        cases.CONFIGS[name] = dataclasses.replace(c, D=dim)
    cases.CONFIGS["all_devices"] = Config(
        R=num, T=77, D=136, E=4 * num, K=4, dtype="bfloat16", capacity_factor=1.25
    )
    cases.CONFIGS["all_devices_large"] = Config(R=num, T=200, D=1032, E=8 * num, K=8)


def timed(check: Any, *args: Any) -> None:
    start = time.monotonic()
    check(*args)
    print(f"{check.__name__} {' '.join(map(str, args))}: {time.monotonic() - start:.1f} s")


def place(config: Config, a: np.ndarray) -> jax.Array:
    a = cases.devices_first(config, a)
    mesh = cases.make_mesh(config)
    assert mesh is not None
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # The dtype is for processes that have no device of the mesh.
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index], dtype=a.dtype)


def run(config: Config, transport: str, inputs: exchange.Arrays) -> Any:
    placed = [place(config, a) for a in inputs.values()]
    return jax.block_until_ready(exchange.compiled(config, transport, MODE)(*placed))


def local(a: jax.Array) -> dict[int, np.ndarray]:
    """What this process has of an array [devices, ...]."""
    return {s.index[0].start or 0: np.asarray(s.data)[0] for s in a.addressable_shards}


def check_case(case: Case) -> None:
    """Small integers, of which every sum is exact: the specification, to the last number."""
    config = case.config
    got, want = run(config, TRANSPORT, exchange.inputs_of(case)), exchange.specified(case)
    for name, wanted in want.items():
        for device, value in local(got[name]).items():
            np.testing.assert_array_equal(
                value, cases.devices_first(config, wanted)[device].astype(value.dtype), name
            )


def check_floats(case: Case) -> None:
    """The bits of transport "xla", but for sums, which XLA may round differently.

    The sums of combine have the bits of the documented order.
    """

    def floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))

    config, rng = case.config, cases.make_rng(case)
    ids = cases.ROUTINGS[case.routing](rng, config)
    inputs = exchange.make_inputs(config, ids, rng, floats)
    got, want = run(config, TRANSPORT, inputs), run(config, "xla" if NATIVE else TRANSPORT, inputs)
    # In the CPU's kernels the sums of dispatch's gradient happen to be rounded as XLA rounds them.
    sums = {"y", "d_combine_weights"} | (set() if TRANSPORT == "cpu" else {"d_x"})
    for name in set(got) - sums:
        for device, value in local(want[name]).items():
            assert local(got[name])[device].tobytes() == value.tobytes(), (name, device)
    weights = exchange.specify(config, inputs)["row_weights"]
    y = [
        spec.rounded_combine(config, ids[s], inputs["expert_rows"][s], weights[s])
        for s in range(config.num_slices)
    ]
    for device, value in local(got["y"]).items():
        assert value.tobytes() == cases.devices_first(config, np.stack(y))[device].tobytes()


# ---- Programs whose devices all have the same few tokens, over one expert axis.


def make_mesh() -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("expert",), axis_types=auto)


def make_group(**options: Any) -> jaxmoe.ExpertParallel:
    sizes: dict[str, Any] = dict(num_experts=E, top_k=K, dim=D, max_tokens=T, dtype=jnp.float32)
    return jaxmoe.ExpertParallel(
        make_mesh(), transport=TRANSPORT, mode=MODE, timeout=30, **(sizes | options)
    )


def there_and_back(group: jaxmoe.ExpertParallel, x: Any) -> jax.Array:
    """Dispatch and combine with experts that do nothing and weights of 1: K * x."""
    device = jax.lax.axis_index("expert").astype(jnp.int32)
    t, k = jnp.indices((x.shape[0], K), dtype=jnp.int32)
    ids = (device * 5 + t * 3 + k) % jnp.int32(E)
    rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, jnp.ones((x.shape[0], K)))
    return jaxmoe.combine(group, rows, row_weights, plan)


def compiled(body: Any) -> Any:
    """`body` on each device's tokens [T, D], compiled; arrays are [devices, T, D] outside."""
    spec = PartitionSpec("expert")
    return jax.jit(
        jax.shard_map(lambda x: body(x[0])[None], mesh=make_mesh(), in_specs=spec, out_specs=spec)
    )


def tokens(num_tokens: int = T, dtype: Any = jnp.float32) -> tuple[np.ndarray, jax.Array]:
    shape = (jax.device_count(), num_tokens, D)
    a = np.random.default_rng(num_tokens).integers(-4, 5, shape).astype(dtype)
    sharding = NamedSharding(make_mesh(), PartitionSpec("expert"))
    return a, jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


def assert_local(got: jax.Array, want: np.ndarray) -> None:
    for device, value in local(got).items():
        np.testing.assert_array_equal(value, want[device])


def check_different_numbers_of_tokens() -> None:
    group = make_group()
    program = compiled(lambda x: there_and_back(group, x))
    for num_tokens in (T, 1, 4, T):
        host, x = tokens(num_tokens)
        assert_local(program(x), K * host)


def mean(x: jax.Array) -> jax.Array:
    """Of equal values on all devices, through a native collective where there is one."""
    return jax.lax.pmean(x, "expert") if NATIVE else x


def check_scan_with_native_collectives() -> None:
    group, steps = make_group(), 30

    def body(x: Any) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            y = there_and_back(group, carry) / K
            return y + mean(jnp.ones_like(carry)), None

        return jax.lax.scan(step, x, length=steps)[0]

    program = compiled(body)
    host, x = tokens()
    results = [program(x) for _ in range(4)]  # all on their way before the first is awaited
    for result in results:
        assert_local(result, host + steps)


def check_independent_calls_with_native_collectives() -> None:
    group, num_calls = make_group(), 16

    def body(x: Any) -> jax.Array:
        total = jnp.zeros_like(x)
        for i in range(num_calls):
            total = total + there_and_back(group, x * (i + 1)) * (3**i % 7)
            if i % 3 == 0:
                total = total + mean(jnp.full_like(x, i))
        return total

    program = compiled(body)
    host, x = tokens()
    factor = sum(K * (i + 1) * (3**i % 7) for i in range(num_calls))
    for _ in range(10):
        assert_local(jax.block_until_ready(program(x)), factor * host + sum(range(0, 16, 3)))


def check_several_groups() -> None:
    groups = [make_group(), make_group(capacity_factor=8.0), make_group(dtype=jnp.bfloat16)]

    def body(x: Any) -> jax.Array:
        y = [there_and_back(g, x.astype(g.dtype)).astype(x.dtype) for g in groups]
        return there_and_back(groups[0], y[0] + y[1] + y[2])

    host, x = tokens()
    assert_local(compiled(body)(x), 3 * K * K * host)


def check_calls_in_two_halves() -> None:
    """Two pending at a time, a whole call between, in a loop; on CPUs the starts do all here."""
    group, steps = make_group(max_pending=2), 20

    def step(x: Any, _: Any) -> Any:
        device = jax.lax.axis_index("expert").astype(jnp.int32)
        t, k = jnp.indices((T, K), dtype=jnp.int32)
        ids, weights = (device * 3 + t * 5 + k) % jnp.int32(E), jnp.ones((T, K))
        pending = [jaxmoe.dispatch_start(group, x * i, ids, weights) for i in (1, 2)]
        whole = there_and_back(group, x)
        second = jaxmoe.dispatch_done(group, pending[1])
        first = jaxmoe.dispatch_done(group, pending[0])
        pending = [jaxmoe.combine_start(group, *results) for results in (first, second)]
        y = [jaxmoe.combine_done(group, p) for p in pending]
        return (y[0] + y[1] + whole) / (4 * K), None

    program = compiled(lambda x: jax.lax.scan(step, x, length=steps)[0])
    host, x = tokens()
    assert_local(program(x), host)


def check_closing_a_group() -> None:
    group = make_group(max_tokens=T + 1)
    program = compiled(lambda x: there_and_back(group, x))
    host, x = tokens()
    assert_local(program(x), K * host)
    group.close()
    # Which type JAX picks depends on whether the program had begun to run.
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="a group that was closed"):
        jax.block_until_ready(program(x))


if __name__ == "__main__":
    main()
    print(f"process {RANK} is done")
