"""Process 1 of 2 makes mistakes, and then is killed or stops; process 0 must get named errors.

Arguments: "kill" or "stop". Process 0 ends with 0 if all errors are as they should be.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

RANK = processes.join()

TIMEOUT = 2.0
E, K, D = 8, 2, 4
mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))


def make_group(top_k: int = K) -> jaxmoe.ExpertParallel:
    return jaxmoe.ExpertParallel(
        mesh,
        num_experts=E,
        top_k=top_k,
        dim=D,
        max_tokens=8,
        dtype=jnp.float32,
        transport="cpu",
        timeout=TIMEOUT,
    )


def call(group: jaxmoe.ExpertParallel, num_tokens: int) -> jax.Array:
    def body(x: Any) -> jax.Array:
        ids = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (x.shape[0], K))
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, jnp.ones_like(ids, jnp.float32))
        return jaxmoe.combine(group, rows, row_weights, plan)

    spec = PartitionSpec("expert")
    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    shape = (4 * num_tokens, D)
    x = jax.make_array_from_callback(
        shape, NamedSharding(mesh, spec), lambda _: np.ones((num_tokens, D), np.float32)
    )
    return jax.block_until_ready(program(x))


def assert_fails(body: Callable[[], object], error: type[Exception], *patterns: str) -> None:
    """`body` raises an error whose text matches, not much later than the timeout."""
    start = time.monotonic()
    with pytest.raises(error) as raised:
        body()
    seconds, text = time.monotonic() - start, str(raised.value)
    print(f"after {seconds:.1f} s: {text}\n", flush=True)
    assert seconds < TIMEOUT + 4, seconds  # what a loaded machine takes on top
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"


# Groups in another order on each process.
assert_fails(
    lambda: [make_group(top_k) for top_k in ((1, 3) if RANK == 0 else (3, 1))],
    RuntimeError,
    rf"process {RANK} could not join processes \[0, 1\] within 2.0 s",
    r"make the same groups in the same order, on one host",
)

group = make_group()
call(group, 3)

# Different programs: to XLA, and so to us, these are different runs.
assert_fails(
    lambda: call(group, 4 + RANK),
    jax.errors.JaxRuntimeError,
    rf"jaxmoe_dispatch on device [{'01' if RANK == 0 else '23'}]: timed out after 2 s",
    rf"did not come \(processes \[{1 - RANK}\]\)",
    rf"tokens {4 + RANK}, top_k 2, dim 4",
    r"A device stopped or runs another program",
)
call(group, 3)

if RANK == 1:
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[sys.argv[1]])
for _ in range(2):
    assert_fails(
        lambda: call(group, 3),
        jax.errors.JaxRuntimeError,
        r"jaxmoe_dispatch on device [01]: timed out after 2 s",
        r"devices \[2, 3\] of the expert axis did not come \(processes \[1\]\), "
        r"devices \[0, 1\] did",
        r"A device stopped or runs another program; a slow one needs a longer timeout=",
    )
group.close()
print("closed", flush=True)
os._exit(0)  # jax.distributed's own shutdown would wait for the process that is gone
