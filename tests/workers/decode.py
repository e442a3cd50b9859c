"""Decodes with the transport of the launch and with "xla"; says whether the tokens are the same.

    decode.py STEPS FILE

Writes to FILE the name and target of each custom call of the library in the compiled step, one a
line. With XLA_FLAGS=--xla_dump_to=... XLA writes its programs beside that.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import processes
from decoding import GREEDY, cache_copies, cache_shape, make_model, random_tokens

from generate import Generator
from model import split_model
from presets import PRESETS

RANK = processes.join()


def main(steps: int, names: Path) -> None:
    transport = os.environ.get("JAXMOE_TEST_TRANSPORT", "auto")
    # Wide enough for the GPU kernels' vectors.
    config = dataclasses.replace(
        PRESETS["tiny-latent"].model,
        dim=128,
        expert_hidden_dim=64,
        context=steps + 16,
        num_layers=3,
        dtype="bfloat16",
    )
    rows = 4 * jax.device_count()
    results = []
    for name in (transport, "xla"):
        model = make_model(config, jax.device_count(), transport=name)
        graphdef, *weights = split_model(model)
        generator = Generator(
            graphdef,
            (weights[0], weights[1]),
            [random_tokens(1, 1 + i % 9)[0] for i in range(rows)],
            mesh=model.mesh,
            end_of_text=-1,
            max_new_tokens=steps,
            sampling=GREEDY,
            steps_per_call=16,
        )
        if name == transport:
            hlo = generator.lower_continue().compile().as_text()
            found = re.findall(r'%?([\w.\-]+) = [^\n]*custom_call_target="(jaxmoe_\w+)"', hlo)
            names.write_text("\n".join(" ".join(call) for call in found))
            # Fusions may read a cache in another order; a copy is a copy.
            copies = cache_copies(hlo, cache_shape(generator), kinds=("copy", "copy-start"))
            print(f"process {RANK}: copies of a cache in the loop: {copies}")
        *_, tokens = generator.stream()
        results.append(tokens)
    same = np.array_equal(*results)
    kinds = len(np.unique(results[0]))
    print(f"process {RANK}: {results[0].size} tokens of {kinds} kinds, the same: {same}")


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    main(int(sys.argv[1]), Path(sys.argv[2]))
