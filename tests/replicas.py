"""What `nn.DataParallel` runs on every device, without a second device."""

from __future__ import annotations

import torch
from torch import nn


def replica_of(model: nn.Module) -> nn.Module:
    """A copy as `torch.nn.parallel.replicate` makes it: tensors in the parameters' places, all else shared."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        copy = copies[id(module)]
        for name, child in module._modules.items():
            if child is not None:
                setattr(copy, name, copies[id(child)])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, tensor * 1 if torch.is_grad_enabled() else tensor.detach().clone())
    return copies[id(model)]
