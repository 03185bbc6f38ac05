"""The router of a layer: one linear score per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization


class Router(nn.Module):
    """Holds w [1, D] and b [1] of the score x . w + b, zero at first: every token then ties.

    Calling it returns the two parameters rather than scores, because the fused op scores, selects
    and gathers in one pass. It is called as a module, so that wrappers which swap modules (PEFT's
    `modules_to_save`) or load them (offloading hooks) are obeyed.
    """

    def __init__(
        self, hidden_size: int, *, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        zero = nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zero)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight [1, D] and bias [1] or None; `hidden_states` only satisfies wrappers.

        Where gradients are recorded these are views. Their backward nodes make the gradients of a
        layer's parameters come in one order, routed or not: ZeRO-2 sums over its ranks whatever
        gradients came first on each.
        """
        weight, bias = self.weight, self.bias
        if torch.is_grad_enabled():
            weight, bias = weight.view_as(weight), None if bias is None else bias.view_as(bias)
        return weight, bias

    def reset(self) -> None:
        """Zero the parameters that no checkpoint has filled."""
        # transformers' zeros_ skips parameters that were loaded
        initialization.zeros_(self.weight)
        if self.bias is not None:
            initialization.zeros_(self.bias)


class ZeroGradient(torch.autograd.Function):
    """Pass hidden states through, and give the router a gradient of zeros.

    A text-only batch does not use the router. Without this its gradient would be None there, and
    data-parallel ranks would reduce different sets of parameters.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The hidden states, unchanged."""
        ctx.save_for_backward(weight, *(() if bias is None else (bias,)))
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The incoming gradient, and zeros."""
        zeros = [torch.zeros_like(parameter) for parameter in ctx.saved_tensors]
        return (grads[0], zeros[0], zeros[1] if len(zeros) == 2 else None)
