"""Mixture-of-Experts for JAX: expert parallelism in `jax.shard_map` through XLA custom calls.

The names below are imported when they are first used, so that `python -m jaxmoe` can look at a
machine, and start processes on it, without JAX.
"""

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "BlockQuantizedExperts": "jaxmoe.block_quantized",
    "ExchangeError": "jaxmoe.transport.failures",
    "ExpertParallel": "jaxmoe.group",
    "MoE": "jaxmoe.nnx",
    "MoEStats": "jaxmoe.layer",
    "Plan": "jaxmoe.plan",
    "QuantizedRows": "jaxmoe.wire",
    "RouterBias": "jaxmoe.nnx",
    "RouterConfig": "jaxmoe.routing",
    "Routing": "jaxmoe.routing",
    "Pending": "jaxmoe.split",
    "between": "jaxmoe.split",
    "combine": "jaxmoe.ops",
    "combine_done": "jaxmoe.split",
    "combine_start": "jaxmoe.split",
    "dispatch": "jaxmoe.ops",
    "dispatch_done": "jaxmoe.split",
    "dispatch_start": "jaxmoe.split",
    "grouped_matmul": "jaxmoe.products",
    "quantize_blocks": "jaxmoe.block_quantized",
    "route": "jaxmoe.routing",
    "update_bias": "jaxmoe.routing",
}

_MODULES = ("balance", "compress", "estimate", "losses", "residuals")

if TYPE_CHECKING:
    from jaxmoe import balance as balance
    from jaxmoe import compress as compress
    from jaxmoe import estimate as estimate
    from jaxmoe import losses as losses
    from jaxmoe import residuals as residuals
    from jaxmoe.block_quantized import BlockQuantizedExperts as BlockQuantizedExperts
    from jaxmoe.block_quantized import quantize_blocks as quantize_blocks
    from jaxmoe.group import ExpertParallel as ExpertParallel
    from jaxmoe.layer import MoEStats as MoEStats
    from jaxmoe.nnx import MoE as MoE
    from jaxmoe.nnx import RouterBias as RouterBias
    from jaxmoe.ops import combine as combine
    from jaxmoe.ops import dispatch as dispatch
    from jaxmoe.plan import Plan as Plan
    from jaxmoe.products import grouped_matmul as grouped_matmul
    from jaxmoe.routing import RouterConfig as RouterConfig
    from jaxmoe.routing import Routing as Routing
    from jaxmoe.routing import route as route
    from jaxmoe.routing import update_bias as update_bias
    from jaxmoe.split import Pending as Pending
    from jaxmoe.split import between as between
    from jaxmoe.split import combine_done as combine_done
    from jaxmoe.split import combine_start as combine_start
    from jaxmoe.split import dispatch_done as dispatch_done
    from jaxmoe.split import dispatch_start as dispatch_start
    from jaxmoe.transport.failures import ExchangeError as ExchangeError
    from jaxmoe.wire import QuantizedRows as QuantizedRows
else:

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return importlib.import_module(f"jaxmoe.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME, *_MODULES})
