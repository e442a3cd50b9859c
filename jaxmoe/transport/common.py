"""What the transports share: numbering groups, and laying a mesh out along its expert axis."""

from __future__ import annotations

import collections
import json
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxmoe.group import GroupSpec

_opened: collections.Counter[str] = collections.Counter()


def per_device(
    mesh: jax.sharding.Mesh | None, spec: GroupSpec, of: Callable[[jax.Device], int]
) -> np.ndarray:
    """A number `of` every device, as [slice along the other axes, device of the expert axis]."""
    if mesh is None:
        return np.array([[of(jax.local_devices()[0])]], np.int64)
    names = list(mesh.axis_names)
    order = [names.index(a) for a in (*spec.other_axes, *spec.axis)]
    numbers = np.vectorize(of, otypes=[np.int64])(mesh.devices)
    return numbers.transpose(order).reshape(-1, spec.num_devices)


def new_uid(mesh: jax.sharding.Mesh | None, spec: GroupSpec) -> int:
    """A number that stands for the group in compiled programs, equal in all of its processes.

    Made from the group's content and how many equal groups came before it, so that programs lower
    to the same text from one run to the next, and processes may make groups that the others do not
    have.
    """
    devices: list[Any] = [] if mesh is None else [d.id for d in mesh.devices.flat]
    content = json.dumps([repr(spec), devices])
    count = _opened[content]
    _opened[content] += 1
    low, high = (zlib.crc32(f"{side}{count}{content}".encode()) for side in "lh")
    return (high & 0x7FFFFFFF) << 32 | low


def kv_client() -> Any:
    """The client of the key-value store of `jax.distributed`; None if that is not initialised."""
    from jax._src import distributed  # no public name for the key-value store in any release so far

    return distributed.global_state.client
