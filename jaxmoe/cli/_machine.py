"""What a machine has, without JAX: packages, GPUs, their links, variables that matter."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from jaxmoe.cli import _system

PACKAGES = ("jaxmoe", "jax", "jaxlib", "flax")
CUDA_PACKAGES = tuple(
    name.format(cuda)
    for cuda in (13, 12)
    for name in ("jax-cuda{}-plugin", "nvidia-nvshmem-cu{}", "nvidia-nccl-cu{}")
)
_PREFIXES = ("XLA_", "JAX_", "JAXMOE_", "NCCL_", "NVSHMEM_", "CUDA_")
_GPU_FIELDS = ("index", "name", "memory.total", "driver_version", "compute_cap")


def facts() -> dict[str, Any]:
    """All of it."""
    gpus, problem = _gpus()
    topology = _system.ask(["nvidia-smi", "topo", "-m"]) if gpus else None
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES + CUDA_PACKAGES},
        "gpus": gpus,
        "gpu_problem": problem,
        "topology": topology.plain if topology is not None and topology.code == 0 else None,
        "host_library": _host_library(),
        "cuda_build": _cuda_build(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[list[dict[str, str]], str]:
    """The GPUs that the driver shows, and why it does not answer."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    answer = _system.ask(["nvidia-smi", query, "--format=csv,noheader"])
    if answer is None:
        return [], ""
    if answer.code is None:
        return [], "nvidia-smi does not answer"
    if answer.code:
        # It prints its failures to standard output.
        return [], f"nvidia-smi failed: {(answer.output + answer.errors).strip()}"
    rows = [line.split(", ") for line in answer.output.splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows if len(row) > 1], ""


def _host_library() -> str | None:
    spec = importlib.util.find_spec("jaxmoe._cpu")
    return spec.origin if spec else None


def _cuda_build() -> str | None:
    """The sentence that the build left about the CUDA libraries."""
    # An editable install has its libraries elsewhere than its sources.
    packages = [Path(__file__).parents[1], *(Path(p) / "jaxmoe" for p in sys.path)]
    notes = (package / "lib" / "cuda_library.txt" for package in packages)
    return next((note.read_text().strip() for note in notes if note.is_file()), None)
