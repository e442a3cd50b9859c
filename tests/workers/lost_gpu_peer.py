"""Process 1 of 2 makes mistakes, and then is killed or stops; process 0 must get named errors.

Arguments: "kill" or "stop". Process 0 ends with 0 if all errors are as they should be.
"""

import faulthandler
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

faulthandler.dump_traceback_later(75)  # where it hangs, if it does
RANK = processes.join()
TIMEOUT = 2.0
T, K, D = 6, 2, 64
mesh = jax.make_mesh((2,), ("expert",))
SPEC = PartitionSpec("expert")


def make_group(top_k: int = K) -> jaxmoe.ExpertParallel:
    return jaxmoe.ExpertParallel(
        mesh, num_experts=8, top_k=top_k, dim=D, max_tokens=8, transport="nvshmem", timeout=TIMEOUT
    )


def tokens(num_tokens: int) -> jax.Array:
    shape = (2 * num_tokens, D)
    ones = np.ones((num_tokens, D), jnp.bfloat16)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, SPEC), lambda _: ones)


def program(group: jaxmoe.ExpertParallel, num_pairs: int = 1) -> Any:
    def pair(x: Any, _: Any) -> Any:
        ids = jnp.broadcast_to(jnp.array([0, 7], jnp.int32), (x.shape[0], K))
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, jnp.ones_like(ids, jnp.float32))
        return jaxmoe.combine(group, rows, row_weights, plan) / 2, None

    def body(x: Any) -> Any:
        return jax.lax.scan(pair, x, length=num_pairs)[0]

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=SPEC, out_specs=SPEC))


def local(y: jax.Array) -> np.ndarray:
    return np.asarray(y.addressable_shards[0].data).astype(np.float32)


def assert_fails(body: Callable[[], object], error: Any, *patterns: str, seconds: float) -> None:
    """`body` raises an error whose text matches, in time."""
    start = time.monotonic()
    with pytest.raises(error) as raised:
        body()
    took, text = time.monotonic() - start, str(raised.value)
    print(f"after {took:.1f} s: {text}\n", flush=True)
    assert took < seconds, took
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"


EITHER = (jaxmoe.ExchangeError, jax.errors.JaxRuntimeError)


def wait_for_interrupt(y: jax.Array) -> None:
    """The results of a failed call are NaN; the error follows although nothing is called.

    Unless a later call of the same program was not enqueued yet: then that raises.
    """
    assert np.isnan(local(y)).all(), y
    for _ in range(600):
        time.sleep(0.02)


def check_groups_in_another_order() -> None:
    make_group().close()  # the first one starts NVSHMEM, which takes seconds
    assert_fails(
        lambda: [make_group(top_k) for top_k in ((1, 3) if RANK == 0 else (3, 1))],
        RuntimeError,
        rf"process {RANK} could not open the group within 2.0 s",
        "make the same groups in the same order",
        seconds=TIMEOUT + 5,
    )


def check_calls_in_another_order() -> None:
    group = make_group()
    # Both programs on both processes, since XLA has processes tune a program together.
    pairs = [program(group).lower(tokens(n)).compile() for n in (T, T - 1)]
    pairs[0](tokens(T)).block_until_ready()
    y = pairs[RANK](tokens(T - RANK))  # calls of T and of T - 1 tokens meet
    assert_fails(
        lambda: wait_for_interrupt(y),
        EITHER,
        rf"jaxmoe_dispatch on device {RANK}: device {1 - RANK} is in another call",
        r"expected jaxmoe_dispatch \[[0-9a-f]+\], seen jaxmoe_dispatch \[",
        "with their calls in the same order",
        seconds=TIMEOUT + 6,
    )
    assert_fails(
        lambda: program(group)(tokens(T)).block_until_ready(),
        jax.errors.JaxRuntimeError,
        "is in another call",
        "The group cannot be used any more",
        seconds=5,
    )
    group.close()


def check_later_call(one: Any, named: str) -> None:
    """A call of a group that has failed raises the same error. A captured one cannot: it is NaN."""
    start = time.monotonic()
    try:
        y = local(one(tokens(T)))
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        assert re.search(named, text), text
        assert re.search("expected [0-9]+, seen [0-9]+; call [0-9]+ of the group", text), text
    else:
        assert np.isnan(y).all(), y
    assert time.monotonic() - start < 5


def main() -> None:
    check_groups_in_another_order()
    check_calls_in_another_order()
    group = make_group()
    one, many = program(group), program(group, 50)
    for _ in range(3):
        np.testing.assert_array_equal(local(many(tokens(T))), 1.0)
        one(tokens(T)).block_until_ready()
    if RANK == 1:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[sys.argv[1]])
    named = r"jaxmoe_dispatch on device 0: timed out after 2 s waiting for .* \(device 1\)"
    # A program whose calls are captured: no host code of ours runs when it fails.
    y = many(tokens(T))
    assert_fails(lambda: wait_for_interrupt(y), EITHER, named, seconds=TIMEOUT + 6)
    for _ in range(3):
        check_later_call(one, named)
    group.close()
    print("closed", flush=True)


try:
    main()
except BaseException:
    traceback.print_exc()
    os._exit(1)
os._exit(0)  # jax.distributed's own shutdown would wait for the process that is gone
