"""The ways that rows travel between devices: which one fits a mesh, what a group opens of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import jax

from jaxmoe.transport import cpu as _cpu
from jaxmoe.transport import cuda as _cuda

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec

NAMES = ("auto", "cpu", "p2p", "xla")
_log = logging.getLogger("jaxmoe")


class Handle(Protocol):
    """What a transport holds for one group."""

    uid: int

    def close(self) -> None: ...


class _Nothing:
    """`transport="xla"` holds nothing."""

    uid = 0

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
    reasons = {fast: _why_not(fast, mesh, spec) for fast in ("cpu", "p2p")}
    picked = next((fast for fast, reason in reasons.items() if not reason), "xla")
    _log.info("transport 'auto' picked %r; others: %s", picked, reasons)
    return picked


def _why_not(name: str, mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> str:
    """Why transport `name` cannot serve the mesh; empty if it can."""
    if name == "p2p":
        return _cuda.why_not(mesh, spec)
    return _cpu.why_not(jax.default_backend() if mesh is None else mesh.devices.flat[0].platform)


def open_group(name: str, mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> Handle:
    """Open what a group needs of a transport; collective when the mesh spans processes."""
    if name == "p2p":
        return _cuda.P2pGroup(mesh, spec)
    return _cpu.CpuGroup(mesh, spec) if name == "cpu" else _Nothing()
