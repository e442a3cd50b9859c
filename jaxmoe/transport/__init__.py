"""The ways that rows travel between devices: which one fits a mesh, what a group opens of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import jax

from jaxmoe.transport import cpu as _cpu

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec

NAMES = ("auto", "cpu", "xla")
_log = logging.getLogger("jaxmoe")


class Handle(Protocol):
    """What a transport holds for one group."""

    uid: int

    def close(self) -> None: ...


class _Nothing:
    """`transport="xla"` holds nothing."""

    uid = 0

    def close(self) -> None: ...


def pick(name: str, mesh: jax.sharding.Mesh | None) -> str:
    """The transport to use: `name`, or for "auto" the fastest one that can run on the mesh."""
    if name not in NAMES:
        raise ValueError(
            f"ExpertParallel: transport must be one of {', '.join(map(repr, NAMES))}, got {name!r}."
        )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if name == "xla":
        return name
    reason = _cpu.why_not(platform)
    if name == "cpu":
        if reason:
            raise RuntimeError(f"ExpertParallel: transport 'cpu' cannot run here: {reason}")
        return name
    picked = "xla" if reason else "cpu"
    _log.info("transport 'auto' picked %r%s", picked, f": {reason}" if reason else "")
    return picked


def open_group(name: str, mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> Handle:
    """Open what a group needs of a transport; collective when the mesh spans processes."""
    return _cpu.CpuGroup(mesh, spec) if name == "cpu" else _Nothing()
