"""Writes texts with the first devices of this machine; prints their tokens.

greedy.py KIND DEVICES, KIND as in `decoding.CONFIGS`. Float32 throughout, without TF32.
"""

from __future__ import annotations

import sys

import jax
import processes
from decoding import CONFIGS, make_generator, make_model

processes.join()
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_default_matmul_precision", "highest")
model = make_model(CONFIGS[sys.argv[1]], int(sys.argv[2]))
print(f"tokens: {make_generator(model).generate().tolist()}", flush=True)
