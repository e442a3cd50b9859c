"""Mixture-of-Experts for JAX: expert parallelism in `jax.shard_map` through XLA custom calls."""

from jaxmoe import losses as losses
from jaxmoe.group import ExpertParallel as ExpertParallel
from jaxmoe.layer import MoEStats as MoEStats
from jaxmoe.nnx import MoE as MoE
from jaxmoe.nnx import RouterBias as RouterBias
from jaxmoe.ops import combine as combine
from jaxmoe.ops import dispatch as dispatch
from jaxmoe.plan import Plan as Plan
from jaxmoe.routing import RouterConfig as RouterConfig
from jaxmoe.routing import Routing as Routing
from jaxmoe.routing import route as route
from jaxmoe.routing import update_bias as update_bias
