"""What `python -m jaxmoe doctor` asks JAX, in a process of its own that may hang or crash.

    python -m jaxmoe.cli._probe devices | bandwidth | exchange TRANSPORT

The answer is one line of JSON behind `MARK`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import numpy as np

    import jaxmoe

MARK = "JAXMOE_PROBE "
_BANDWIDTH_BYTES = 1 << 29
_REPEATS = 7
_QUEUED = 4  # calls, so that what starting one costs is not measured
_NUM_TOKENS, _DIM, _TOP_K = 32, 128, 2


def answers_in(output: str) -> list[dict[str, Any]]:
    """The answers among what a probe, or a launch of probes, has printed."""
    found = (line.partition(MARK) for line in output.splitlines())
    return [json.loads(text) for _, mark, text in found if mark]


def devices() -> dict[str, Any]:
    """Devices, libraries, and for every transport why it cannot serve them, or nothing."""
    import jax

    from jaxmoe import transport
    from jaxmoe.transport import cuda, nvshmem

    mesh = _mesh(jax.devices())
    spec = _group(mesh, "xla").spec
    names = [name for name in transport.NAMES if name not in ("auto", "xla")]
    path, reason = nvshmem.host_library()
    libraries = {name: cuda.library_path(name) for name in ("cuda", "nvshmem")}
    return {
        "platform": jax.default_backend(),
        "devices": [{"id": d.id, "kind": d.device_kind} for d in jax.local_devices()],
        "why_not": {name: transport._why_not(name, mesh, spec) for name in names} | {"xla": ""},
        "libraries": {name: str(path) if path else None for name, path in libraries.items()},
        "nvshmem_library": str(path) if path else None,
        "nvshmem_reason": reason,
    }


def bandwidth() -> dict[str, Any]:
    """Copies between each pair of this process's devices, and within each."""
    import jax

    return {"gb_per_s": measure(jax.local_devices(), _BANDWIDTH_BYTES)}


def measure(devices: Sequence[jax.Device], num_bytes: int) -> list[list[float]]:
    """GB/s from a device (row) to another (column); on the diagonal bytes read and written."""
    import jax
    import jax.numpy as jnp

    copy = jax.jit(lambda a: -a)
    rates = []
    for source in devices:
        array = jax.device_put(jnp.ones(num_bytes // 4, jnp.float32), source)
        rates.append(
            [
                2 * num_bytes / _seconds(lambda a=array: copy(a))  # type: ignore[misc]
                if target == source
                else num_bytes / _seconds(lambda a=array, d=target: jax.device_put(a, d))  # type: ignore[misc]
                for target in devices
            ]
        )
    return [[round(rate / 1e9, 1) for rate in row] for row in rates]


def _seconds(call: Callable[[], Any]) -> float:
    """The median time of a call, of several that are queued together; the first are not counted."""
    import jax

    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(_QUEUED)])
        times.append((time.perf_counter() - start) / _QUEUED)
    return statistics.median(times[1:])


def exchange(name: str) -> dict[str, Any]:
    """Dispatch and combine by a transport, compared with "xla" and with what must come back."""
    import jax
    import numpy as np

    mesh = _mesh(jax.devices())
    start = time.perf_counter()
    try:
        group = _group(mesh, name)
    except RuntimeError as error:
        return {
            "works": False,
            "reason": str(error).partition("cannot run here: ")[2] or str(error),
        }
    got, tokens = _there_and_back(group)
    seconds = round(time.perf_counter() - start, 1)
    want, _ = _there_and_back(_group(mesh, "xla"))
    same = all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    # Experts that do nothing, and weights that add up to one.
    same &= np.array_equal(got[0], tokens)
    reason = "" if same else "it gives other numbers than transport 'xla'"
    return {"works": same, "reason": reason, "num_devices": mesh.size, "seconds": seconds}


def _mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    import jax

    return jax.make_mesh(
        (len(devices),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


def _group(mesh: jax.sharding.Mesh, name: str) -> jaxmoe.ExpertParallel:
    import jax.numpy as jnp

    import jaxmoe

    return jaxmoe.ExpertParallel(
        mesh, num_experts=2 * mesh.size, top_k=_TOP_K, dim=_DIM, max_tokens=_NUM_TOKENS,
        dtype=jnp.float32, transport=name, timeout=20.0,
    )  # fmt: skip


def _there_and_back(group: jaxmoe.ExpertParallel) -> tuple[list[np.ndarray], np.ndarray]:
    """This process's part of the outputs and rows; and of the tokens that went in."""
    import jax
    import numpy as np

    import jaxmoe

    def body(x: Any, ids: Any, weights: Any) -> Any:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return jaxmoe.combine(group, rows, row_weights, plan), rows, row_weights

    mesh, rng = group.mesh, np.random.default_rng(0)
    assert mesh is not None
    num_tokens = mesh.size * _NUM_TOKENS
    x = rng.integers(-8, 9, (num_tokens, _DIM)).astype(np.float32)
    ids = np.argsort(rng.random((num_tokens, group.num_experts)), axis=1)[:, :_TOP_K]
    weights = np.full((num_tokens, _TOP_K), 1 / _TOP_K, np.float32)
    spec = jax.sharding.PartitionSpec("expert")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    inputs = [
        jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])  # type: ignore[misc]
        for a in (x, ids.astype(np.int32), weights)
    ]
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    return [_local(a) for a in run(*inputs)], _local(inputs[0])


def _local(a: jax.Array) -> np.ndarray:
    import numpy as np

    return np.concatenate([np.asarray(shard.data) for shard in a.addressable_shards])


def main(words: Sequence[str]) -> None:
    """Answer one question."""
    probes: dict[str, Callable[..., dict[str, Any]]] = {
        "devices": devices,
        "bandwidth": bandwidth,
        "exchange": exchange,
    }
    print(MARK + json.dumps(probes[words[0]](*words[1:])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
