"""Which arithmetic the towers run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from infra.logs import log


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether the device has bfloat16 multiply instructions: AVX-512 BF16 or AMX on a CPU."""
    if device.type != "cpu":
        return True
    information = Path("/proc/cpuinfo")
    flags = information.read_text(encoding="utf-8").split() if information.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags


def chosen(precision: str, device: torch.device) -> torch.dtype:
    """Return the type for `float32`, `bfloat16`, or `auto`: bfloat16 where the device gains from it."""
    if precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
        log.info("precision: %s", precision)
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the towers run; weights and what is summed stay in float32."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def laid_out(images: Tensor, channels_last: bool) -> Tensor:
    """Return `[B, C, H, W]` in the memory layout that convolutions prefer on a CPU."""
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images.contiguous()
