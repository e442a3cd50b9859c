"""Starts JAX for the tests: eight host devices, strict dtype promotion.

``JAXMOE_REQUIRE_GPUS`` leaves the choice of the platform to JAX.
"""

import os

NUM_HOST_DEVICES = 8

# JAX reads these once, when it is imported.
_flag = f"--xla_force_host_platform_device_count={NUM_HOST_DEVICES}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
if not os.environ.get("JAXMOE_REQUIRE_GPUS"):
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")

from hypothesis import settings  # noqa: E402

# A change is judged by the same examples each time; by hand every run looks for new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
