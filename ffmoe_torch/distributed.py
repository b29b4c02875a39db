"""Which parameters are whose when a model runs on many ranks."""

from torch import nn

from .layer import MoELayer


def get_dense_params(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that every rank holds alike: all but ``MoELayer.expert_params``."""
    expert = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, MoELayer)
        for parameter in module.expert_params
    }
    return [parameter for parameter in model.parameters() if id(parameter) not in expert]
