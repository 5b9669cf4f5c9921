"""The same bits from the same run, where the operations can give them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from infra.errors import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""What its documentation names for results that repeat; the first is faster."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let every operation in the block give the same bits each time, if wanted; one that cannot raises RuntimeError.

    To be entered before anything is computed on a card.

    Raises:
        UserError: the environment asks cuBLAS for something else.
    """
    if not wanted:
        yield
        return
    if torch.cuda.is_available():
        given = os.environ.setdefault(CUBLAS, WORKSPACES[0])
        if given not in WORKSPACES:
            raise UserError(
                f"{CUBLAS}: {given!r} lets results differ, which parallel.deterministic rules out; "
                f"set it to {' or '.join(WORKSPACES)}, or unset it"
            )
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    chosen = (cudnn.deterministic, cudnn.benchmark)
    torch.use_deterministic_algorithms(True, warn_only=False)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = chosen
