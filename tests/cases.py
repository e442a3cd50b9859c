"""The table of cases that the tests of the operations and of the layer draw on.

A `Config` is what a program is compiled for; a `Case` adds a routing pattern, which is data.
Numbers are small integers, exact in every dtype and in every order of summation, so that tests can
ask for equality. Arrays of a case are [S, R, ...]: S slices of the mesh, R devices of the expert
axis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

NUM_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class MeshKind:
    """`shape` of a mesh with R devices on the expert axis, its axes' names and the expert axis."""

    shape: Callable[[int], tuple[int, ...]]
    names: tuple[str, ...]
    axis: str | tuple[str, ...] = "expert"


MESHES = {
    "expert": MeshKind(lambda r: (r,), ("expert",)),
    "data_expert": MeshKind(lambda r: (NUM_DEVICES // r, r), ("data", "expert")),
    "expert_data": MeshKind(lambda r: (r, NUM_DEVICES // r), ("expert", "data")),
    "tuple": MeshKind(lambda r: (2, NUM_DEVICES // r, r // 2), ("a", "data", "b"), ("a", "b")),
    "reversed": MeshKind(lambda r: (2, r // 2), ("a", "b"), ("b", "a")),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, mesh and options; letters as in the library's design: R, T, D, E, K."""

    R: int = 4
    T: int = 5
    D: int = 8
    E: int = 8
    K: int = 2
    dtype: str = "float32"
    capacity_factor: float | None = None
    mesh: str | None = "expert"
    explicit: bool = False
    check_vma: bool = True
    wire: str | None = None  # wire_scale of an FP8 wire
    fp8_rows: bool = False

    @property
    def L(self) -> int:  # noqa: N802
        return self.E // self.R

    @property
    def num_slices(self) -> int:
        return 1 if self.mesh is None else math.prod(MESHES[self.mesh].shape(self.R)) // self.R

    @property
    def C(self) -> int:  # noqa: N802
        """Rows of a device, from the contract: the worst case, or `ceil(factor * T * K)`."""
        worst = self.R * self.T * self.K
        if self.capacity_factor is None:
            return worst
        return min(worst, math.ceil(round(self.capacity_factor * self.T * self.K, 6)))


CONFIGS = {
    "plain": Config(),
    "no_mesh": Config(R=1, T=6, D=7, E=5, mesh=None),
    "no_mesh_drops": Config(R=1, T=6, D=7, E=5, dtype="bfloat16", capacity_factor=0.5, mesh=None),
    "one_expert_device": Config(R=1, T=4, D=3, E=3, dtype="bfloat16", mesh="data_expert"),
    "two_devices_f16": Config(R=2, T=7, D=33, E=6, K=3, dtype="float16", capacity_factor=0.5),
    "eight_devices": Config(R=8, T=3, D=5, E=16, K=4, dtype="bfloat16", capacity_factor=1.25),
    "data_expert": Config(T=4, D=9, K=3, dtype="bfloat16", mesh="data_expert", check_vma=False),
    "data_expert_explicit": Config(
        T=6, D=6, dtype="float16", capacity_factor=1.25, mesh="data_expert", explicit=True
    ),
    "expert_data_tiny": Config(R=2, T=5, D=4, E=4, capacity_factor=0.01, mesh="expert_data"),
    "tuple": Config(D=7, mesh="tuple", capacity_factor=1.25),
    "tuple_explicit": Config(T=3, mesh="tuple", explicit=True),
    "reversed": Config(T=4, D=5, K=3, capacity_factor=0.5, mesh="reversed", check_vma=False),
    "no_tokens": Config(T=0),
    "one_token": Config(R=8, T=1, D=1, E=8, K=1),
    "all_experts": Config(R=2, T=4, E=4, K=4, D=16),
    # Large enough for the thread pool of the CPU transport.
    "large": Config(R=8, T=64, D=128, E=32, K=4, dtype="bfloat16"),
    "large_drops": Config(T=100, D=95, E=8, K=2, capacity_factor=1.0),
    "wire": Config(D=208, dtype="bfloat16", mesh="data_expert", wire="amax"),
    "wire_float32": Config(R=2, T=7, D=16, E=6, K=3, capacity_factor=0.5, wire="amax"),
    "wire_powers": Config(R=8, T=3, D=144, E=16, K=4, dtype="float16", wire="power_of_two"),
    "wire_no_mesh": Config(
        R=1, T=6, D=32, E=5, dtype="bfloat16", capacity_factor=0.5, mesh=None, wire="power_of_two"
    ),
    "wire_narrow": Config(R=2, T=4, D=1, E=4, dtype="bfloat16", wire="amax"),
    "wire_large": Config(
        T=64, D=1920, E=32, K=4, dtype="bfloat16", capacity_factor=1.0, wire="amax"
    ),
}


def _distinct(rng: np.random.Generator, c: Config, log_weights: np.ndarray) -> np.ndarray:
    """K different experts per token, drawn by the Gumbel trick; [S, R, T, K]."""
    noise = rng.gumbel(size=(c.num_slices, c.R, c.T, c.E)) + log_weights
    return np.argsort(-noise, axis=-1)[..., : c.K].astype(np.int32)


def _uniform(rng: np.random.Generator, c: Config) -> np.ndarray:
    return _distinct(rng, c, np.zeros(c.E))


def _zipf(rng: np.random.Generator, c: Config) -> np.ndarray:
    return _distinct(rng, c, -2 * np.log(1 + np.arange(c.E)))


def _one_expert(rng: np.random.Generator, c: Config) -> np.ndarray:
    ids = _uniform(rng, c)
    ids[..., 1:][ids[..., 1:] == c.E - 1] = -1
    ids[..., 0] = c.E - 1
    return ids


def _one_device(rng: np.random.Generator, c: Config) -> np.ndarray:
    last = (c.R - 1) * c.L
    return (last + _uniform(rng, c) % c.L).astype(np.int32)


def _empty_experts(rng: np.random.Generator, c: Config) -> np.ndarray:
    """Every other expert gets nothing."""
    return _uniform(rng, c) // 2 * 2


def _masked(rng: np.random.Generator, c: Config) -> np.ndarray:
    """Some tokens have no expert, some choices of others neither."""
    ids = _uniform(rng, c)
    ids[rng.random(ids.shape) < 0.2] = -1
    ids[rng.random(ids.shape[:-1]) < 0.3] = -1
    return ids


def _all_masked(rng: np.random.Generator, c: Config) -> np.ndarray:
    return np.full_like(_uniform(rng, c), -1)


def _invalid(rng: np.random.Generator, c: Config) -> np.ndarray:
    ids = _masked(rng, c)
    bad = np.array([c.E, c.E + 1, -2, 2**31 - 1, -(2**31)], np.int32)
    return np.where(rng.random(ids.shape) < 0.3, rng.choice(bad, ids.shape), ids).astype(np.int32)


def _duplicates(rng: np.random.Generator, c: Config) -> np.ndarray:
    """All choices of a token are one expert."""
    return np.repeat(_uniform(rng, c)[..., :1], c.K, axis=-1)


ROUTINGS: dict[str, Callable[[np.random.Generator, Config], np.ndarray]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "one_expert": _one_expert,
    "one_device": _one_device,
    "empty_experts": _empty_experts,
    "masked": _masked,
    "all_masked": _all_masked,
    "invalid": _invalid,
    "duplicates": _duplicates,
}

# The patterns of each configuration: all where programs are few and small, elsewhere those that
# meet the configuration's own trait.
_PATTERNS = {
    "plain": tuple(ROUTINGS),
    "eight_devices": tuple(ROUTINGS),
    "no_mesh": ("uniform", "masked", "invalid", "one_expert"),
    "no_mesh_drops": ("uniform", "zipf", "one_expert"),
    "one_expert_device": ("uniform", "masked"),
    "two_devices_f16": ("uniform", "zipf", "one_device", "duplicates"),
    "data_expert": ("uniform", "zipf", "masked", "invalid"),
    "data_expert_explicit": ("zipf", "invalid"),
    "expert_data_tiny": ("uniform", "one_device", "all_masked"),
    "tuple": ("zipf", "one_device"),
    "reversed": ("uniform", "one_expert"),
    "large": ("zipf", "masked"),
    "large_drops": ("zipf", "uniform"),
    "wire": ("uniform", "invalid"),
    "wire_float32": ("zipf", "one_device"),
    "wire_powers": ("masked",),
    "wire_large": ("zipf",),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration and a routing pattern, by name."""

    name: str
    routing: str

    @property
    def config(self) -> Config:
        return CONFIGS[self.name]

    def __str__(self) -> str:
        return f"{self.name}-{self.routing}"


CASES = [Case(name, routing) for name in CONFIGS for routing in _PATTERNS.get(name, ("uniform",))]
SMOKE = (
    Case("plain", "masked"),
    Case("eight_devices", "zipf"),
    Case("data_expert", "invalid"),
    Case("no_mesh_drops", "zipf"),
)


@functools.cache
def make_mesh(config: Config) -> Mesh | None:
    """The mesh of a configuration, over the first devices there are."""
    if config.mesh is None:
        return None
    kind = MESHES[config.mesh]
    shape = kind.shape(config.R)
    axis_type = AxisType.Explicit if config.explicit else AxisType.Auto
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, kind.names, axis_types=(axis_type,) * len(shape))


def slices_first(config: Config, a: np.ndarray) -> np.ndarray:
    """From [devices in the mesh's order, ...] to [S, R, ...]."""
    if config.mesh is None:
        return a[None]
    kind, shape = MESHES[config.mesh], MESHES[config.mesh].shape(config.R)
    order = _axis_order(kind)
    a = a.reshape(shape + a.shape[1:])
    rest = tuple(range(len(shape), a.ndim))
    lead = (config.num_slices, config.R)
    return a.transpose(order + rest).reshape(lead + a.shape[len(shape) :])


def devices_first(config: Config, a: np.ndarray) -> np.ndarray:
    """The inverse of `slices_first`."""
    if config.mesh is None:
        return a[0]
    kind, shape = MESHES[config.mesh], MESHES[config.mesh].shape(config.R)
    order = _axis_order(kind)
    tail = a.shape[2:]
    a = a.reshape(tuple(shape[i] for i in order) + tail)
    rest = tuple(range(len(shape), a.ndim))
    return a.transpose(tuple(np.argsort(order)) + rest).reshape((math.prod(shape), *tail))


def _axis_order(kind: MeshKind) -> tuple[int, ...]:
    axes = (kind.axis,) if isinstance(kind.axis, str) else kind.axis
    others = tuple(a for a in kind.names if a not in axes)
    return tuple(kind.names.index(a) for a in (*others, *axes))


def make_rng(name: object) -> np.random.Generator:
    """A generator whose seed is the name's, equal in every run."""
    return np.random.default_rng(zlib.crc32(str(name).encode()))


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Integers from -4 to 4."""
    return rng.integers(-4, 5, shape).astype(jax.numpy.dtype(dtype))
