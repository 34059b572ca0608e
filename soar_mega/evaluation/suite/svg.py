"""Figures of the page as inline SVG: bars and curves with error bars."""

import math
from collections.abc import Mapping, Sequence
from html import escape

# Paul Tol's bright scheme: told apart with any colour vision.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
WIDTH, HEIGHT = 760, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 12, 34

Whisker = tuple[float, float, float]  # value, low, high


def bars(groups: Sequence[str], series: Mapping[str, Sequence[Whisker]]) -> str:
    """A bar of each series in each group."""
    axis = _Axis([0.0, *(bound for values in series.values() for value in values for bound in value)])
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = 0.8 * slot / len(series)
    parts = axis.lines()
    for number, values in enumerate(series.values()):
        for group, (value, low, high) in enumerate(values):
            x = LEFT + group * slot + 0.1 * slot + number * width
            top, foot = sorted((axis.y(value), axis.y(0.0)))
            place = f'x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{foot - top:.1f}"'
            parts.append(f'<rect {place} fill="{_colour(number)}"/>')
            parts.append(_whisker(x + width / 2, axis.y(low), axis.y(high)))
    parts += [_text(LEFT + (i + 0.5) * slot, HEIGHT - 14, name, "middle") for i, name in enumerate(groups)]
    return _figure(parts, list(series))


def curves(places: Sequence[float], series: Mapping[str, Sequence[Whisker]], label: str) -> str:
    """A line of each series over places."""
    axis = _Axis([bound for values in series.values() for value in values for bound in value])
    first, last = min(places), max(places)

    def x_of(place: float) -> float:
        return LEFT + 20 + (place - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT - 40)

    parts = axis.lines()
    for number, values in enumerate(series.values()):
        ordered = sorted(zip(places, values, strict=True))
        points = " ".join(f"{x_of(place):.1f},{axis.y(value[0]):.1f}" for place, value in ordered)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(number)}" stroke-width="2"/>')
        for place, (_, low, high) in ordered:
            # beside each other: error bars of several models would hide one another
            x = x_of(place) + 3 * (number - (len(series) - 1) / 2)
            parts.append(_whisker(x, axis.y(low), axis.y(high), _colour(number)))
    parts += [_text(x_of(place), HEIGHT - 18, f"{place:g}", "middle") for place in places]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 4, label, "middle"))
    return _figure(parts, list(series))


class _Axis:
    """The vertical one, over all values."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or abs(high) * 0.06 or 1.0
        self._low = low if low == 0.0 else low - room
        self._high = high + room

    def y(self, value: float) -> float:
        return TOP + (self._high - value) / (self._high - self._low) * (HEIGHT - TOP - BOTTOM)

    def lines(self) -> list[str]:
        parts = []
        for value in _round_numbers(self._low, self._high):
            y = self.y(value)
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e3e3"/>'
            )
            parts.append(_text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
        return parts


def _round_numbers(low: float, high: float) -> list[float]:
    """About four between two others."""
    step = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(step))
    step = next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if power * factor >= step)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(parts: Sequence[str], names: Sequence[str]) -> str:
    legend = "".join(
        f'<span><i style="background:{_colour(number)}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f'<figure>{picture}<figcaption class="legend">{legend}</figcaption></figure>'


def _whisker(x: float, low: float, high: float, colour: str = "#333333") -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
