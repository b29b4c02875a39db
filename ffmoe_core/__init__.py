"""ffmoe_core: the runtime of a mixture-of-experts layer, for arrays of any framework.

Every function takes NumPy arrays, CuPy arrays, torch tensors or anything else that speaks DLPack, works
where they live, on the caller's stream, and answers in the caller's own kind. None of them is seen by autograd:
gradients are functions of their own, such as ``moe_backward``. For torch's there is ``ffmoe_torch``.
"""

from .config import MoEConfig
from .cpu.threads import get_num_threads, set_num_threads
from .expert_parallel import ExpertParallel, expert_range
from .glu import glu_down, glu_down_backward, glu_up, glu_up_backward
from .moe import MoEGrads, MoEResult, MoESaved, moe_backward, moe_forward
from .plan import RoutingLayout, RoutingPlan, routing_layout, unpack_routing
from .stages import Routing, combine, grouped_gemm, grouped_gemm_wgrad, make_plan, permute, route

__all__ = [
    "ExpertParallel",
    "MoEConfig",
    "MoEGrads",
    "MoEResult",
    "MoESaved",
    "Routing",
    "RoutingLayout",
    "RoutingPlan",
    "combine",
    "expert_range",
    "get_num_threads",
    "glu_down",
    "glu_down_backward",
    "glu_up",
    "glu_up_backward",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "make_plan",
    "moe_backward",
    "moe_forward",
    "permute",
    "route",
    "routing_layout",
    "set_num_threads",
    "unpack_routing",
]
