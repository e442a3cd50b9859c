"""The ways that rows travel between devices: which one fits a mesh, what a group opens of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import jax

from jaxmoe.transport import cpu as _cpu
from jaxmoe.transport import nvshmem as _nvshmem
from jaxmoe.transport import p2p as _p2p

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec

NAMES = ("auto", "cpu", "p2p", "nvshmem", "xla")
FAST = ("cpu", "p2p", "nvshmem")  # with custom calls; "auto" takes the first that can run
_log = logging.getLogger("jaxmoe")


class Handle(Protocol):
    """What a transport holds for one group."""

    uid: int
    heap_bytes: int  # on each device
    latency_tokens: int  # most tokens of a call by low-latency kernels; 0 where there are none
    split_tokens: int  # likewise of one in two halves

    def close(self) -> None: ...


class _Nothing:
    """`transport="xla"` holds nothing."""

    uid = 0
    heap_bytes = 0
    latency_tokens = 0
    split_tokens = 0

    def close(self) -> None: ...


def pick(name: str, mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> str:
    """The transport to use: `name`, or for "auto" the fastest one that can run on the mesh."""
    if name not in NAMES:
        raise ValueError(
            f"ExpertParallel: transport must be one of {', '.join(map(repr, NAMES))}, got {name!r}."
        )
    if name == "xla":
        return name
    if name != "auto":
        reason = _why_not(name, mesh, spec)
        if reason:
            raise RuntimeError(f"ExpertParallel: transport {name!r} cannot run here: {reason}")
        return name
    reasons = {fast: _why_not(fast, mesh, spec) for fast in FAST}
    picked = next((fast for fast, reason in reasons.items() if not reason), "xla")
    # Users of GPUs want to know why they get the slow one.
    slow = picked == "xla" and _platform(mesh) == "gpu"
    others = "; ".join(f"not {fast!r}: {reason}" for fast, reason in reasons.items() if reason)
    _log.log(logging.WARNING if slow else logging.INFO, "transport %r; %s", picked, others)
    return picked


def _platform(mesh: jax.sharding.Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _why_not(name: str, mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> str:
    """Why transport `name` cannot serve the mesh; empty if it can."""
    if name == "p2p":
        return _p2p.why_not(mesh, spec)
    if name == "nvshmem":
        return _nvshmem.why_not(mesh, spec)
    return _cpu.why_not(_platform(mesh))


def open_group(name: str, mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> Handle:
    """Open what a group needs of a transport; collective when the mesh spans processes."""
    if name == "p2p":
        return _p2p.P2pGroup(mesh, spec)
    if name == "nvshmem":
        assert mesh is not None  # or why_not has said so
        return _nvshmem.NvshmemGroup(mesh, spec)
    return _cpu.CpuGroup(mesh, spec) if name == "cpu" else _Nothing()
