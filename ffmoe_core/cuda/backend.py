"""CudaBackend: the stages of a layer on an NVIDIA GPU."""

from .dispatch import dispatch_ranks, dispatch_slots
from .fill import fill
from .grouped_gemm import grouped_gemm, grouped_gemm_wgrad, grouped_glu, grouped_glu_backward
from .permute import combine, permute, sort
from .routing import gate_backward, gate_logits, route, route_and_sort, route_backward, router_losses


class CudaBackend:
    """See ``ffmoe_core.backend.Backend``."""

    name = "cuda"

    gate_logits = staticmethod(gate_logits)
    route = staticmethod(route)
    route_and_sort = staticmethod(route_and_sort)
    router_losses = staticmethod(router_losses)
    route_backward = staticmethod(route_backward)
    gate_backward = staticmethod(gate_backward)

    sort = staticmethod(sort)
    permute = staticmethod(permute)
    combine = staticmethod(combine)

    fill = staticmethod(fill)

    dispatch_ranks = staticmethod(dispatch_ranks)
    dispatch_slots = staticmethod(dispatch_slots)

    grouped_gemm = staticmethod(grouped_gemm)
    grouped_gemm_wgrad = staticmethod(grouped_gemm_wgrad)
    grouped_glu = staticmethod(grouped_glu)
    grouped_glu_backward = staticmethod(grouped_glu_backward)
