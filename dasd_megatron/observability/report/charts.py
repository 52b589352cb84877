"""Charts as inline SVG.

Colours are CSS variables of the page (--c1 ..., --run1 ..., --pull, --push), so that one drawing serves the light and
the dark page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 36
MAX_POINTS = 400

Format = Callable[[float], str]
Scale = Callable[[float], float]
"""Turns a value into a coordinate of the drawing."""
Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One curve: ``values`` runs with the chart's x. None and values that cannot be drawn are gaps. ``colour`` names a
    CSS variable."""

    name: str
    values: Values
    colour: str
    dash: str = ""
    faint: bool = False


class Band(NamedTuple):
    """An area behind the curves, from ``lower`` to ``upper``, which run with the chart's x."""

    name: str
    lower: Values
    upper: Values
    colour: str


class _Range(NamedTuple):
    """The smallest and the largest value of each group of points that became one; both empty where none did."""

    lowest: Values
    highest: Values


class _Points(NamedTuple):
    """The points that are drawn."""

    x: list[float]
    columns: list[list[float | None]]
    ranges: list[_Range]
    """One for each column."""
    group: int
    """The number of points that became one."""


class _Frame(NamedTuple):
    """The places of the points and the ticks of a chart."""

    positions: Sequence[float]
    """The x of each point, in the unit that ``x_at`` takes."""
    x_at: Scale
    y_at: Scale
    x_labels: Sequence[tuple[float, str]]
    """(position, text) of each tick of the x axis."""
    y_ticks: Sequence[float]
    height: int


class _Key(NamedTuple):
    """An entry of the legend; ``kind`` is how it is drawn: line, dash, faint or area."""

    name: str
    colour: str
    kind: str


def format_percent(value: float) -> str:
    """Write a share as percent with one decimal."""
    return f"{100 * value:.1f}%"


def format_number(value: float) -> str:
    """Write about three significant digits: 0.0312, 12.5, 4,120, 1.2e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def format_position(value: float) -> str:
    """Write a place on the x axis."""
    return str(int(value)) if value == int(value) else f"{value:.1f}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high], low < high."""
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]


def moving_mean(values: Values, window: int) -> list[float | None]:
    """Return the mean of the ``window`` values that end at each place (fewer at the start), gaps and non-finite values
    left out."""
    result: list[float | None] = []
    for end in range(1, len(values) + 1):
        part = [value for value in values[max(0, end - window) : end] if value is not None and math.isfinite(value)]
        result.append(sum(part) / len(part) if part else None)
    return result


def line_chart(
    title: str,
    unit: str,
    x: Sequence[float],
    series: Sequence[Series],
    *,
    form: Format = format_number,
    x_label: str = "training step",
    x_names: Sequence[str] | None = None,
    band: Band | None = None,
    include_zero: bool = False,
    most: float | None = None,
    markers: bool = False,
    bridge: bool = False,
    note: str = "",
    about: str = "",
    height: int = HEIGHT,
    points: int = MAX_POINTS,
) -> Markup:
    """Draw a figure with one or more curves over ``x``.

    Args:
        unit: stands beside the title.
        form: writes a value.
        x_names: one name for each point, set at equal distances in place of the numbers under the axis.
        include_zero: the y axis includes 0.
        most: the largest value that can occur (1 for shares), which the axis then does not exceed.
        markers: a dot at each point.
        bridge: curves run across gaps, for values that not every x has.
        note: the caption.
        about: what the question mark explains; no question mark without it.
        points: more points than these are averaged in groups, and areas then show the smallest and largest value of
            each group.
    """
    thinned = _thin(x, [curve.values for curve in series] + ([band.lower, band.upper] if band else []), points)
    curves = [replace(curve, values=values) for curve, values in zip(series, thinned.columns, strict=False)]
    ranges = thinned.ranges[: len(curves)]
    if band:
        band = band._replace(lower=thinned.columns[-2], upper=thinned.columns[-1])
    finite = [
        value
        for values in [*thinned.columns, *(values for range_ in ranges for values in range_)]
        for value in values
        if value is not None
    ]
    if not finite:
        return _figure(title, unit, Markup('<p class="empty">No finite values.</p>'), "", note, about)
    frame = _line_frame(thinned.x, finite, x_names, include_zero, most, height)
    parts = [
        _axes(frame, form, x_label),
        *([_area(frame, band.lower, band.upper, band.colour)] if band else []),
        *(_area(frame, *range_, curve.colour, "range") for curve, range_ in zip(curves, ranges, strict=True)),
        *(_stroke(frame, curve, bridge, markers or len(frame.positions) == 1) for curve in curves),
    ]
    hover = {
        "x": [round(frame.x_at(position), 1) for position in frame.positions],
        "label": x_label,
        "at": "|".join(x_names or map(format_position, thinned.x)),
        "rows": _hover_rows(curves, band, form),
    }
    keys = [
        _Key(curve.name, curve.colour, "dash" if curve.dash else "faint" if curve.faint else "line") for curve in curves
    ]
    keys += [_Key(band.name, band.colour, "area")] if band else []
    group = thinned.group
    lost = sum(1 for curve in series for value in curve.values if value is not None and not _is_drawable(value))
    notes = [
        note,
        f"Each point is the mean of {group}, areas span their smallest and largest." if group > 1 else "",
        f"{lost} values were NaN or infinite and are left out." if lost else "",
    ]
    legend = _legend(keys) if len(keys) > 1 else ""
    return _figure(title, unit, _svg(title, parts, hover, height), legend, " ".join(filter(None, notes)), about)


def stacked_chart(title: str, unit: str, x: Sequence[float], layers: Sequence[Series]) -> Markup:
    """Draw a figure of ``layers`` piled up at every training step, as columns; None and values below 0 count as 0."""
    thinned = _thin(x, [layer.values for layer in layers], MAX_POINTS)
    piles = [[max(value or 0.0, 0.0) for value in values] for values in thinned.columns]
    totals = [sum(values) for values in zip(*piles, strict=True)]
    frame = _column_frame(thinned.x, max(totals))
    parts = [_axes(frame, format_number, "training step")]
    base = [0.0] * len(totals)
    for layer, values in zip(layers, piles, strict=True):
        top = [under + value for under, value in zip(base, values, strict=True)]
        parts.append(_layer(frame, base, top, layer.colour))
        base = top
    rows = [
        [layer.name, layer.colour, _joined(map(format_number, values))]
        for layer, values in zip(layers, piles, strict=True)
    ]
    hover = {
        "x": [round(frame.x_at(index + 0.5), 1) for index in range(len(totals))],
        "label": "training step",
        "at": "|".join(map(format_position, thinned.x)),
        "rows": [*rows, ["total", "ink", _joined(map(format_number, totals))]],
    }
    legend = _legend([_Key(layer.name, layer.colour, "area") for layer in layers])
    note = f"Each column is the mean of {thinned.group} steps." if thinned.group > 1 else ""
    return _figure(title, unit, _svg(title, parts, hover, HEIGHT), legend, note, "")


def _is_drawable(value: float) -> bool:
    """Return whether a value is finite, and small enough for differences of two such values to be finite as well."""
    return abs(value) < 1e300


def _thin(x: Sequence[float], columns: Sequence[Values], points: int) -> _Points:
    """Average consecutive points in groups, so that at most ``points`` are left."""
    group = math.ceil(len(x) / points)
    drawn = [[value if value is not None and _is_drawable(value) else None for value in values] for values in columns]
    if group <= 1:
        return _Points(list(x), drawn, [_Range([], []) for _ in drawn], 1)
    chunked = [
        [[value for value in values[i : i + group] if value is not None] for i in range(0, len(values), group)]
        for values in drawn
    ]
    means = [[sum(chunk) / len(chunk) if chunk else None for chunk in chunks] for chunks in chunked]
    ranges = [
        _Range([min(chunk, default=None) for chunk in chunks], [max(chunk, default=None) for chunk in chunks])
        for chunks in chunked
    ]
    return _Points([x[min(i + group, len(x)) - 1] for i in range(0, len(x), group)], means, ranges, group)


def _line_frame(
    x: Sequence[float],
    finite: Sequence[float],
    x_names: Sequence[str] | None,
    include_zero: bool,
    most: float | None,
    height: int,
) -> _Frame:
    low, high = min(finite), max(finite)
    if include_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    low, high = _widen(low, high)
    ticks = nice_ticks(low, high)
    if most is not None and high <= most:
        ticks = [tick for tick in ticks if tick <= most + 1e-9] or ticks
    positions = list(range(len(x))) if x_names else list(x)
    inset = 18 if x_names else 0
    return _Frame(
        positions,
        _scale(positions[0], positions[-1], LEFT + inset, WIDTH - RIGHT - inset),
        _scale(min(low, ticks[0]), max(high, ticks[-1]), height - BOTTOM, TOP),
        list(zip(positions, x_names, strict=True)) if x_names else _x_ticks(positions),
        ticks,
        height,
    )


def _column_frame(x: Sequence[float], highest: float) -> _Frame:
    """Return the frame of columns of one width, where column i lies between i and i + 1."""
    ticks = nice_ticks(*_widen(0.0, highest))
    wanted = {name for _, name in _x_ticks(x)}
    labels = [
        (index + 0.5, format_position(value)) for index, value in enumerate(x) if format_position(value) in wanted
    ]
    labels = labels or [(index + 0.5, format_position(x[index])) for index in range(0, len(x), math.ceil(len(x) / 6))]
    return _Frame(
        range(len(x)),
        _scale(0.0, float(len(x)), LEFT, WIDTH - RIGHT),
        _scale(0.0, ticks[-1], HEIGHT - BOTTOM, TOP),
        labels,
        ticks,
        HEIGHT,
    )


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return a range that is not empty, wide enough for ticks that differ in floating point."""
    size = max(abs(low), abs(high))
    # Below this, differences lose their digits or vanish.
    if size < 1e-290:
        return 0.0, 1.0
    if high - low > 1e-9 * size:
        return low, high
    return low - 0.1 * size, high + 0.1 * size


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    if high == low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _x_ticks(positions: Sequence[float]) -> list[tuple[float, str]]:
    low, high = positions[0], positions[-1]
    if low == high:
        return [(low, format_position(low))]
    ticks = [tick for tick in nice_ticks(low, high, 8) if low <= tick <= high]
    if all(position == int(position) for position in positions):
        ticks = [tick for tick in ticks if tick == int(tick)]
    return [(tick, format_position(tick)) for tick in ticks]


def _tick_form(form: Format, step: float, largest: float) -> Format:
    """Return a format with as many decimals as the distance of the ticks needs."""
    if form is format_percent:
        decimals = max(0, -math.floor(math.log10(100 * step) + 1e-9))
        return lambda value: f"{100 * value:.{decimals}f}%"
    if form is format_number and (largest < 1e-3 or largest >= 1e7):
        return lambda value: "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if form is format_number:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return lambda value: f"{value:,.{decimals}f}"
    return form


def _axes(frame: _Frame, form: Format, x_label: str) -> Markup:
    ticks, bottom = frame.y_ticks, frame.height - BOTTOM
    steps = [later - tick for tick, later in zip(ticks, ticks[1:], strict=False)]
    write = _tick_form(form, min(steps) if steps else 1.0, max(map(abs, ticks)))
    grid = Markup(
        '<line class="grid{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" '
        'text-anchor="end">{}</text>'
    )
    rows = Markup("").join(
        grid.format(" zero" if tick == 0 else "", LEFT, WIDTH - RIGHT, y, y, LEFT - 7, y + 3.5, write(tick))
        for tick, y in ((tick, frame.y_at(tick)) for tick in ticks)
    )
    columns = Markup("").join(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(frame.x_at(position), bottom + 15, name)
        for position, name in frame.x_labels
    )
    label = Markup('<text class="axis" x="{:.0f}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, frame.height - 4, x_label
    )
    return rows + columns + label


def _stretches(positions: Sequence[float], *columns: Values) -> list[list[tuple[float, ...]]]:
    """Return the stretches of points without a gap in any column, as tuples of position and values."""
    stretches: list[list[tuple[float, ...]]] = [[]]
    for position, *values in zip(positions, *columns, strict=True):
        present = [value for value in values if value is not None]
        if len(present) < len(values):
            stretches.append([])
        else:
            stretches[-1].append((position, *present))
    return [stretch for stretch in stretches if stretch]


def _stroke(frame: _Frame, curve: Series, bridge: bool, markers: bool) -> Markup:
    stretches = _stretches(frame.positions, curve.values)
    if bridge and stretches:
        stretches = [[point for stretch in stretches for point in stretch]]
    # A stretch of one point is drawn as a line from the point to itself.
    path = "".join(
        "M"
        + "L".join(
            f"{frame.x_at(position):.1f} {frame.y_at(value):.1f}"
            for position, value in (stretch if len(stretch) > 1 else stretch * 2)
        )
        for stretch in stretches
    )
    kind = "curve faint" if curve.faint else "curve"
    dash = Markup(' stroke-dasharray="{}"').format(curve.dash) if curve.dash else ""
    stroke = Markup('<path class="{}" style="stroke:var(--{})"{} d="{}"/>').format(kind, curve.colour, dash, path)
    if not markers:
        return stroke
    return stroke + Markup("").join(
        Markup('<circle class="mark" style="fill:var(--{})" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
            curve.colour, frame.x_at(position), frame.y_at(value)
        )
        for stretch in stretches
        for position, value in stretch
    )


def _area(frame: _Frame, lower: Values, upper: Values, colour: str, kind: str = "band") -> Markup:
    if not any(value is not None for value in lower):
        return Markup("")
    path = ""
    for stretch in _stretches(frame.positions, lower, upper):
        edge = [f"{frame.x_at(position):.1f} {frame.y_at(high):.1f}" for position, _, high in stretch] + [
            f"{frame.x_at(position):.1f} {frame.y_at(low):.1f}" for position, low, _ in reversed(stretch)
        ]
        path += "M" + "L".join(edge) + "Z"
    return Markup('<path class="{}" style="fill:var(--{})" d="{}"/>').format(kind, colour, path)


def _layer(frame: _Frame, base: Sequence[float], top: Sequence[float], colour: str) -> Markup:
    """Draw the columns of one layer of a stack, each from its ``base`` to its ``top``."""
    width = (WIDTH - LEFT - RIGHT) / len(top)
    x_at, y_at = frame.x_at, frame.y_at
    outline = "".join(f"L{x_at(i):.1f} {y_at(value):.1f}H{x_at(i) + width:.1f}" for i, value in enumerate(top))
    floor = "".join(
        f"L{x_at(i) + width:.1f} {y_at(value):.1f}H{x_at(i):.1f}" for i, value in reversed(list(enumerate(base)))
    )
    return Markup('<path class="layer" style="fill:var(--{})" d="M{}{}Z"/>').format(colour, outline[1:], floor)


def _hover_rows(curves: Sequence[Series], band: Band | None, form: Format) -> list[list[str]]:
    """Return name, colour and written values of each curve and of the band, for the page's script."""
    rows = [
        [curve.name, curve.colour, _joined(None if value is None else form(value) for value in curve.values)]
        for curve in curves
    ]
    if band:
        spans = (
            None if low is None or high is None else f"{form(low)} to {form(high)}"
            for low, high in zip(band.lower, band.upper, strict=True)
        )
        rows.append([band.name, band.colour, _joined(spans)])
    return rows


def _joined(values: Iterable[str | None]) -> str:
    """Return one string in place of a list: quotes take five characters each in an attribute."""
    return "|".join(value or "" for value in values)


def _svg(title: str, parts: Sequence[Markup], hover: dict[str, Any], height: int) -> Markup:
    data = json.dumps(hover, separators=(",", ":"), ensure_ascii=False)
    cross = Markup('<line class="cross" y1="{}" y2="{}"/>').format(TOP, height - BOTTOM)
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" data-chart="{}">').format(
        WIDTH, height, title, data
    )
    return opening + Markup("").join(parts) + cross + Markup("</svg>")


def _legend(keys: Sequence[_Key]) -> Markup:
    items = Markup("").join(
        Markup('<li><i class="key {}" style="--c:var(--{})"></i>{}</li>').format(key.kind, key.colour, key.name)
        for key in keys
    )
    return Markup('<ul class="legend">{}</ul>').format(items)


def _figure(title: str, unit: str, body: Markup, legend: Markup | str, note: str, about: str) -> Markup:
    mark = (
        Markup('<button type="button" class="about" aria-label="about {}" data-about="{}">?</button>').format(
            title, about
        )
        if about
        else ""
    )
    head = Markup('<h3>{} <span class="unit">{}</span>{}</h3>').format(title, unit, mark)
    caption = Markup("<figcaption>{}</figcaption>").format(escape(note)) if note else Markup("")
    return Markup('<figure class="chart">{}{}{}{}</figure>').format(head, legend, body, caption)
