"""Charts as numbers in percent of their box; the templates draw them as inline SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Points = Sequence[tuple[float, float]]
Say = Callable[[float], str]
POINTS = 120
"""A line is drawn through at most so many points, each the mean of its share of them."""


@dataclass(frozen=True)
class Tick:
    """A label at `at` percent of an axis, from the left or from the bottom."""

    at: float
    text: str


@dataclass(frozen=True)
class Layer:
    """One drawn line or area: an SVG path in a box of 100 by 100, coloured by `tone`."""

    name: str
    tone: str
    path: str
    is_area: bool


@dataclass(frozen=True)
class Spot:
    """A stretch of the x axis, in percent, with what is shown when one points at it."""

    left: float
    width: float
    lines: tuple[str, ...]
    heights: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn; `alt` says in words what it shows, `latest` is its headline figure."""

    title: str
    latest: str
    alt: str
    layers: tuple[Layer, ...]
    spots: tuple[Spot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...] = ()
    legend: tuple[tuple[str, str], ...] = field(default_factory=tuple)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round values, about `count` steps of 1, 2 or 5 times a power of ten, that enclose [low, high]."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thinned(points: Points, limit: int = POINTS) -> list[tuple[float, float]]:
    """Return at most `limit` points: means over equal runs of finite ones, the last point kept as it is."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= limit:
        return finite
    cuts = [at * (len(finite) - 1) // (limit - 1) for at in range(limit)]
    runs = [finite[start:stop] for start, stop in itertools.pairwise(cuts)]
    return [_mean(run) for run in runs if run] + [finite[-1]]


def lines(
    title: str,
    series: Sequence[tuple[str, str, Points]],
    say_y: Say,
    say_x: Say,
    x_title: str,
    *,
    from_zero: bool = True,
) -> Chart | None:
    """Return a chart of lines, each (name, tone, points); None where no line has a point.

    `from_zero` starts the y axis at zero, else near the lowest value.
    """
    drawn = [(name, tone, thinned(points)) for name, tone, points in series]
    drawn = [(name, tone, points) for name, tone, points in drawn if points]
    if not drawn:
        return None
    ys = [y for _, _, points in drawn for _, y in points]
    xs = [x for _, _, points in drawn for x, _ in points]
    y_values = nice_ticks(0.0 if from_zero and min(ys) >= 0 else min(ys), max(ys))
    left, right = (0.0 if min(xs) >= 0 else min(xs)), max(xs)
    place_x, place_y = _scale(left, right), _scale(y_values[0], y_values[-1])
    layers = tuple(
        Layer(name, tone, _line([(place_x(x), place_y(y)) for x, y in points]), False) for name, tone, points in drawn
    )
    first, last = drawn[0][2][0], drawn[0][2][-1]
    return Chart(
        title, say_y(last[1]), _said(title, say_y(first[1]), say_y(last[1]), f"{say_x(right)} {x_title}"),
        layers, tuple(_spots(drawn, place_x, place_y, say_x, say_y, x_title)),
        _x_ticks(left, right, say_x), tuple(Tick(place_y(y), say_y(y)) for y in y_values),
        legend=tuple((name, tone) for name, tone, _ in drawn) if len(drawn) > 1 else (),
    )  # fmt: skip


def stacked(
    title: str,
    edges: Sequence[float],
    series: Sequence[tuple[str, str, Sequence[float]]],
    say_y: Say,
    say_x: Say,
    x_values: Sequence[float],
    *,
    latest: str,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart | None:
    """Return a chart of steps between `edges`, one layer on the other, each (name, tone, height by step).

    `x_values` are where the x axis is labelled, `marks` vertical lines with what they mean.
    """
    shown = [(name, tone, heights) for name, tone, heights in series if any(heights)]
    if not shown:
        return None
    totals = [sum(step) for step in zip(*(heights for _, _, heights in shown), strict=True)]
    y_values = nice_ticks(0.0, max(totals))
    place_x, place_y = _scale(edges[0], edges[-1]), _scale(0.0, y_values[-1])
    layers, floor = [], [0.0] * len(totals)
    for name, tone, heights in shown:
        top = [low + height for low, height in zip(floor, heights, strict=True)]
        layers.append(Layer(name, tone, _steps(edges, floor, top, place_x, place_y), True))
        floor = top
    spots = []
    for at, (start, stop) in enumerate(itertools.pairwise(edges)):
        said = tuple(f"{name} {say_y(heights[at])}" if name else say_y(heights[at]) for name, _, heights in shown)
        spots.append(Spot(place_x(start), place_x(stop) - place_x(start), (say_x(start), *said)))
    return Chart(
        title, latest, _said(title, say_y(totals[0]), say_y(totals[-1]), say_x(edges[-1])),
        tuple(layers), tuple(spots), tuple(Tick(place_x(x), say_x(x)) for x in x_values),
        tuple(Tick(place_y(y), say_y(y)) for y in y_values),
        tuple(Tick(place_x(x), text) for x, text in marks),
        tuple((name, tone) for name, tone, _ in shown) if len(shown) > 1 else (),
    )  # fmt: skip


def _mean(run: Points) -> tuple[float, float]:
    return sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)


def _said(title: str, first: str, last: str, over: str) -> str:
    return f"{title}: from {first} to {last} over {over}".strip()


def _scale(low: float, high: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: round(100.0 * (value - low) / width, 3)


def _line(points: Points) -> str:
    path = " ".join(f"{'L' if at else 'M'}{x:g} {100 - y:g}" for at, (x, y) in enumerate(points))
    return path if len(points) > 1 else f"{path} l0.5 0"


def _steps(
    edges: Sequence[float],
    floor: Sequence[float],
    top: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
) -> str:
    """Return the outline of steps: along their tops to the right, back along their floors."""
    there = [(x, y) for at, y in enumerate(top) for x in edges[at : at + 2]]
    back = [(x, y) for at, y in enumerate(floor) for x in edges[at : at + 2]][::-1]
    return "M" + " L".join(f"{place_x(x):g} {100 - place_y(y):g}" for x, y in there + back) + " Z"


def _x_ticks(left: float, right: float, say: Say) -> tuple[Tick, ...]:
    place = _scale(left, right)
    return tuple(Tick(place(x), say(x)) for x in nice_ticks(left, right) if left <= x <= right * (1 + 1e-9))


def _spots(
    drawn: Sequence[tuple[str, str, Points]],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    say_x: Say,
    say_y: Say,
    x_title: str,
) -> list[Spot]:
    """Return one spot around each point of the first line, reaching halfway to its neighbours."""
    points = drawn[0][2]
    xs = [place_x(x) for x, _ in points]
    bounds = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(xs)), 100.0]
    spots = []
    for at, (x, _) in enumerate(points):
        near = [(name, tone, min(line, key=lambda point: abs(point[0] - x))) for name, tone, line in drawn]
        said = tuple(f"{name} {say_y(y)}" if len(drawn) > 1 else say_y(y) for name, _, (_, y) in near)
        spots.append(
            Spot(
                round(bounds[at], 3), round(bounds[at + 1] - bounds[at], 3),
                (f"{say_x(x)} {x_title}", *said), tuple((tone, place_y(y)) for _, tone, (_, y) in near),
            )
        )  # fmt: skip
    return spots
