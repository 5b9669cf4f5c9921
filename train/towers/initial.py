"""First weights drawn in place, so that a model built on the meta device begins like one built directly."""

from __future__ import annotations

from torch import nn


def draw_defaults(module: nn.Module) -> None:
    """Give every layer below `module` PyTorch's own first weights and buffers, in the order they were declared."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if reset is not None:
            reset()
