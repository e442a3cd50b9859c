"""`transport="cpu"`: loading the host library, and what one group opens of it.

Within a process devices read each other's buffers directly. Across the processes of a host
(`jax.distributed`) each process copies what its peers need into a shared-memory segment; names and
readiness travel through the key-value store.
"""

from __future__ import annotations

import functools
import importlib
import os
import secrets
from typing import TYPE_CHECKING, Any

import jax

from jaxmoe.transport import common

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec


@functools.cache
def _load() -> tuple[Any, str]:
    """The host library with its handlers registered, or None and the reason."""
    try:
        lib = importlib.import_module("jaxmoe._cpu")
    except ImportError as error:
        return None, f"its library jaxmoe._cpu cannot be imported ({error}); reinstall jaxmoe"
    from jaxmoe import _ffi

    jax.devices("cpu")  # on the host platform XLA takes types only once the client exists
    _ffi.register(lib.handlers(), {"jaxmoe_call": lib.state_type()}, platform="cpu")
    return lib, ""


def why_not(platform: str) -> str:
    """Why this transport cannot serve devices of `platform`; empty if it can."""
    if platform != "cpu":
        return f"it serves CPU devices and these are {platform} devices; use transport='xla'"
    return _load()[1]


class CpuGroup:
    """One group's entry in the host library."""

    def __init__(self, mesh: jax.sharding.Mesh | None, spec: GroupSpec):
        self._lib, reason = _load()
        if reason:
            raise RuntimeError(f"ExpertParallel: transport 'cpu' cannot run here: {reason}")
        processes = common.per_device(mesh, spec, lambda d: d.process_index)
        self.uid = common.new_uid(mesh, spec)
        self.heap_bytes = 0  # devices read each other's buffers
        self.latency_tokens = 0
        alone = bool((processes == jax.process_index()).all())
        self.split_tokens = spec.max_tokens if spec.max_pending and alone else 0
        here = jax.process_index()
        self._lib.open_group(self.uid, spec.timeout, processes.tolist(), here)
        try:
            # A process may also make groups that it has no device in.
            if here in processes and (processes != processes[:, :1]).any():
                _join(self._lib, self.uid, spec, sorted(set(processes.ravel().tolist())), here)
        except BaseException:  # also when the user interrupts the wait for the others
            self.close()
            raise

    def close(self) -> None:
        self._lib.close_group(self.uid)


def _join(lib: Any, uid: int, spec: GroupSpec, members: list[int], here: int) -> None:
    """Map the shared memory of all member processes; returns once all have mapped all."""
    client = common.kv_client()
    if client is None:
        raise RuntimeError(
            "ExpertParallel: the mesh spans several processes, but jax.distributed is not "
            "initialised. Call jax.distributed.initialize first."
        )
    timeout_ms = int(spec.timeout * 1000)
    prefix = f"jaxmoe/cpu/{uid:x}"
    name = f"/jaxmoe-{os.getpid()}-{uid:x}-{secrets.token_hex(4)}"
    try:
        lib.create_segment(
            uid=uid,
            name=name,
            num_devices=spec.num_devices,
            num_experts=spec.num_experts,
            max_tokens=spec.max_tokens,
            top_k=spec.top_k,
            dim=spec.dim,
            dtype=spec.dtype,
        )
        client.key_value_set(f"{prefix}/{here}", name)
        for peer in members:
            if peer != here:
                lib.map_segment(
                    uid, peer, client.blocking_key_value_get(f"{prefix}/{peer}", timeout_ms)
                )
        client.wait_at_barrier(f"{prefix}/mapped", timeout_ms, process_ids=members)
    except Exception as error:
        raise RuntimeError(
            f"ExpertParallel: process {here} could not join processes {members} within "
            f"{spec.timeout} s: {error}. All of them "
            "must make the same groups in the same order, on one host."
        ) from error
    finally:
        lib.unlink_segment(uid)
