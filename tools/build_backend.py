"""The build backend: scikit-build-core, which also asks for NVSHMEM's wheel where nvcc is found.

Whether and for which CUDA it is needed depends on the machine, which pyproject.toml cannot say.
"""

import os
import re
import shutil
import subprocess

from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401, the hooks of PEP 517 and 660
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# The oldest that the kernels run with: newer ones take what was built against older ones.
NVSHMEM_VERSION = "3.4.5"


def get_requires_for_build_wheel(config_settings=None):
    return _build.get_requires_for_build_wheel(config_settings) + nvshmem_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _build.get_requires_for_build_editable(config_settings) + nvshmem_requirements()


def nvshmem_requirements() -> list[str]:
    """NVSHMEM's wheel for this machine's nvcc; none without nvcc."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not nvcc:
        return []
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    release = re.search(r"release (\d+)\.", text.stdout)
    return [f"nvidia-nvshmem-cu{release[1]}=={NVSHMEM_VERSION}"] if release else []
