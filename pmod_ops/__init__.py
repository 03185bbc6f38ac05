"""Fused mixture-of-depths ops for PyTorch: score, select, gather, normalise, scatter back.

Shapes in this package: B sequences, S padded length, N = all rows (packed, or B * S), K kept rows
    of a
layer, D hidden size, P pools. `pmod_ops.reference` states what every op computes.
"""

from pmod_ops import reference
from pmod_ops._library import backend_info, load_kernels
from pmod_ops.gather import gather
from pmod_ops.gather_add_rmsnorm import gather_add_rmsnorm
from pmod_ops.gather_rmsnorm import gather_rmsnorm
from pmod_ops.plan import RoutingPlan
from pmod_ops.route import route
from pmod_ops.route_gather import route_gather
from pmod_ops.routing import Routing
from pmod_ops.weighted_scatter_add import weighted_scatter_add, weighted_scatter_add_

load_kernels()

__version__ = "0.1.0"
__all__ = [
    "Routing",
    "RoutingPlan",
    "backend_info",
    "gather",
    "gather_add_rmsnorm",
    "gather_rmsnorm",
    "reference",
    "route",
    "route_gather",
    "weighted_scatter_add",
    "weighted_scatter_add_",
]
