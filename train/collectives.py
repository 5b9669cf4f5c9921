"""What ranks tell one another: the process group's size, means, votes and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return this process' number in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors: Iterable[Tensor]) -> None:
    """Set each tensor to its mean over the ranks, in place: one message a type and device."""
    if world_size() == 1:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in alike.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def mean_over_ranks(values: Iterable[float]) -> list[float]:
    """Return the mean of each number over the ranks."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(numbers)
    return (numbers / world_size()).tolist()


class Vote:
    """Questions that the ranks answer together once a step, in one message with a number whose mean they want.

    Args:
        questions: each is asked on every rank.

    Attributes:
        answers: whether one rank at least said yes, question by question, when last asked.
    """

    def __init__(self, *questions: Callable[[], bool]) -> None:
        self.questions = questions
        self.answers = (False,) * len(questions)

    def take(self, number: float) -> float:
        """Ask; return the mean of the number over the ranks. Every rank must call it."""
        mean, *shares = mean_over_ranks([number, *(float(question()) for question in self.questions)])
        self.answers = tuple(share > 0 for share in shares)
        return mean


def any_rank(flag: bool) -> bool:
    """Tell every rank whether the flag is set on one of them."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes)
    return bool(votes.item())


def gather_states(state: Tensor) -> list[Tensor]:
    """Return every rank's tensor (same shape and type on all), in rank order."""
    if world_size() == 1:
        return [state]
    states = [torch.empty_like(state) for _ in range(world_size())]
    dist.all_gather(states, state)
    return states
