"""One step's features, loss and gradients, in as many micro batches as memory asks for.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (section 3, GradCache):
encode without a graph, take the loss and its gradient with respect to all features, then encode again, part by
part, and carry that gradient on into the towers. Exact for every parameter, the temperature too, since its
gradient is carried on in the same way. What an objective sums over samples is differentiated while a part is encoded
the second time, with that part's states, of which none are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.gradients import average_gradients, exchanged, reorders_gradients, zero_gradients
from train.model import Features
from train.objectives import SampleSum, read_by_call, read_by_samples
from train.precision import autocast
from train.state import TrainingState
from train.statistics import MeanUpdate, put_aside


class RandomState(NamedTuple):
    """Where the generators of a rank stand."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Return the state of the CPU's and, where it is one, the card's generator."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        """Set the generators back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


Part = tuple[Tensor, Tensor, Tensor | None]
"""Images, token ids, and which patches are kept, of some samples."""


def forward_backward(
    state: TrainingState, images: Tensor, tokens: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave on every parameter the gradient of the whole batch's loss.

    Args:
        state: the run; `parallel.micro_batch` says how many samples are encoded at once.
        images: normalised images `[B, 3, H, W]` of this rank.
        tokens: token ids `[B, L]`.
        kept: numbers of the patches that patch dropout leaves `[B, K]`; None: all, or drawn by the tower.

    Returns:
        This rank's share of the loss, and the objective's numbers.
    """
    if reorders_gradients(state.parallel):  # a pass whose gradients are thrown away
        random = RandomState.now(state.device)
        with put_aside(state.model):
            _backward(state, images, tokens, kept)
        random.restore(state.device)
        zero_gradients(state.parameters())
    loss, numbers = _backward(state, images, tokens, kept)
    average_gradients(state.parallel, state.objective)
    return loss.detach(), numbers


def _backward(
    state: TrainingState, images: Tensor, tokens: Tensor, kept: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    size = state.config.parallel.micro_batch
    if size and size < len(images):
        shares = kept.split(size) if kept is not None else [None] * -(-len(images) // size)
        parts: list[Part] = list(zip(images.split(size), tokens.split(size), shares, strict=True))
        return _in_parts(state, parts, tokens)
    return _at_once(state, images, tokens, kept)


def _encode(
    state: TrainingState, images: Tensor, tokens: Tensor, kept: Tensor | None, needs: frozenset[str]
) -> Features:
    with autocast(state.dtype, state.device):
        return state.parallel(images, tokens, needs, kept=kept)


def _at_once(
    state: TrainingState, images: Tensor, tokens: Tensor, kept: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    features = _encode(state, images, tokens, kept, read_by_samples(state.objective))
    loss, numbers = state.objective(features, tokens)
    if isinstance(state.objective, SampleSum):
        added, more = _of_samples(state, features, tokens, state.objective.denominator(tokens))
        loss, numbers = loss + added, numbers | more
    loss.backward()
    return loss, numbers


def _in_parts(state: TrainingState, parts: list[Part], tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    features, randoms = _features(state, parts)
    loss, numbers = state.objective(features, tokens)
    loss.backward()
    denominator = state.objective.denominator(tokens) if isinstance(state.objective, SampleSum) else None
    after = RandomState.now(state.device)
    sizes = [len(images) for images, *_ in parts]
    gradients = [_parts_of(field, sizes) for field in features]
    for number, (part, random) in enumerate(zip(parts, randoms, strict=True)):
        random.restore(state.device)
        with exchanged(state.parallel, now=number == len(parts) - 1), put_aside(state.model):
            again = _encode(state, *part, read_by_samples(state.objective))
            # A parameter that the objective does not look at has no gradient.
            carried = [
                (out, gradient)
                for out, each in zip(again, gradients, strict=True)
                if out is not None and (gradient := each[number]) is not None
            ]
            roots, seeds = [out for out, _ in carried], [gradient for _, gradient in carried]
            if denominator is not None:
                added, more = _of_samples(state, again, part[1], denominator)
                loss = loss.detach() + added.detach()
                numbers = numbers | {name: numbers.get(name, 0) + value for name, value in more.items()}
                roots, seeds = [*roots, added], [*seeds, torch.ones_like(added)]
            torch.autograd.backward(roots, seeds)
    after.restore(state.device)
    return loss, numbers


def _of_samples(
    state: TrainingState, features: Features, tokens: Tensor, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    assert isinstance(state.objective, SampleSum)
    with autocast(state.dtype, state.device):
        return state.objective.of_samples(features, tokens, denominator)


def _features(state: TrainingState, parts: list[Part]) -> tuple[Features, list[RandomState]]:
    """Encode all parts without a graph: leaves that take a gradient, and the random state before each part."""
    found, randoms, statistics = [], [], MeanUpdate(state.model)
    samples = sum(len(images) for images, *_ in parts)
    with torch.no_grad():
        for images, tokens, kept in parts:
            randoms.append(RandomState.now(state.device))
            with put_aside(state.model) as updated:
                found.append(_encode(state, images, tokens, kept, read_by_call(state.objective)))
                statistics.add(updated, len(images) / samples)
        statistics.apply()
    return Features(*(_leaf(field) for field in zip(*found, strict=True))), randoms


def _leaf(parts: Sequence[Any]) -> Any:
    """Join a field of all parts: features along the batch, a scalar as it is in each of them."""
    if parts[0] is None:
        return None
    return (torch.cat(list(parts)) if parts[0].ndim else parts[0]).detach().requires_grad_()


def _parts_of(field: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    """Return each part's share of a field's gradient: that of its samples; of a scalar, all with the last part."""
    if field is None or field.grad is None:
        return [None] * len(sizes)
    if field.ndim:
        return list(field.grad.split(sizes))
    return [None] * (len(sizes) - 1) + [field.grad]
