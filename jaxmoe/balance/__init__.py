"""Balance of the devices: measure the experts' load, decide replicas and places, move the weights.

`docs/balance.md` shows how the parts go together.
"""

from jaxmoe.balance.affinity import Affinity as Affinity
from jaxmoe.balance.affinity import bytes_saved as bytes_saved
from jaxmoe.balance.affinity import place_by_affinity as place_by_affinity
from jaxmoe.balance.affinity import wire_rows as wire_rows
from jaxmoe.balance.choice import NearReplicas as NearReplicas
from jaxmoe.balance.choice import choose_replicas as choose_replicas
from jaxmoe.balance.choice import locality_of as locality_of
from jaxmoe.balance.choice import near_replicas as near_replicas
from jaxmoe.balance.choice import tie_replicas as tie_replicas
from jaxmoe.balance.eplb import device_loads as device_loads
from jaxmoe.balance.eplb import place as place
from jaxmoe.balance.eplb import replicate as replicate
from jaxmoe.balance.loads import recorded_loads as recorded_loads
from jaxmoe.balance.loads import synthetic_loads as synthetic_loads
from jaxmoe.balance.migration import count_moves as count_moves
from jaxmoe.balance.migration import migrate as migrate
from jaxmoe.balance.migration import migration_steps as migration_steps
from jaxmoe.balance.placement import Placement as Placement
from jaxmoe.balance.placement import check_placement as check_placement
from jaxmoe.balance.placement import contiguous as contiguous
from jaxmoe.balance.placement import placement_of as placement_of
from jaxmoe.balance.rebalance import MoveRule as MoveRule
from jaxmoe.balance.rebalance import align as align
from jaxmoe.balance.rebalance import imbalance as imbalance
from jaxmoe.balance.rebalance import improve as improve
from jaxmoe.balance.rebalance import rebalance as rebalance
from jaxmoe.balance.simulation import Simulation as Simulation
from jaxmoe.balance.simulation import simulate as simulate
from jaxmoe.balance.statistics import LoadStatistics as LoadStatistics
from jaxmoe.balance.statistics import Observation as Observation
from jaxmoe.balance.statistics import expert_load as expert_load
from jaxmoe.balance.statistics import no_statistics as no_statistics
from jaxmoe.balance.statistics import observe as observe
from jaxmoe.balance.statistics import update as update
