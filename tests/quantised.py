"""Linear layers without a plain weight, as quantisation libraries put them into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class QuantisedLinear(nn.Module):
    """8-bit rows with a scale."""

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed * self.scale, self.bias)

    def plain(self) -> nn.Linear:
        """The same layer with its weight spelled out."""
        linear = nn.Linear(1, 1, bias=self.bias is not None)
        linear.weight, linear.bias = nn.Parameter(self.packed * self.scale), self.bias
        return linear


def replace_linears(model: Any, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> int:
    """Puts another module in the place of each one of this kind, but for the head; how many."""
    found = [(name, module) for name, module in model.named_modules() if type(module) is kind and name != "lm_head"]
    for name, module in found:
        model.set_submodule(name, make(module))
    return len(found)
