"""Starts JAX for the tests: eight host devices, strict dtype promotion.

``JAXMOE_REQUIRE_GPUS`` leaves the choice of the platform to JAX.
"""

import os
import signal

NUM_HOST_DEVICES = 8

# A shell's background jobs ignore Control-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
