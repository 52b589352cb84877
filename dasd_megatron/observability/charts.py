"""Charts as inline SVG. Colours are CSS variables of the page (--c1 ..., --run1 ..., --pull, --push), so that one
drawing serves light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 36
MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One curve: ``values`` runs with the chart's x; None and values that cannot be drawn are gaps. ``colour`` names a
    CSS variable."""

    name: str
    values: Sequence[float | None]
    colour: str
    dash: str = ""
    faint: bool = False


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def compact(value: float) -> str:
    """About three significant digits: 0.0312, 12.5, 4,120, 1.2e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high], low < high."""
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]


def line_chart(
    title: str,
    unit: str,
    x: Sequence[float],
    series: Sequence[Series],
    *,
    form: Callable[[float], str] = compact,
    x_label: str = "training step",
    x_names: Sequence[str] | None = None,
    band: tuple[str, Sequence[float | None], Sequence[float | None], str] | None = None,
    level: tuple[str, float] | None = None,
    include_zero: bool = False,
    most: float | None = None,
    markers: bool = False,
    bridge: bool = False,
    note: str = "",
    about: str = "",
    height: int = HEIGHT,
    points: int = MAX_POINTS,
) -> Markup:
    """A figure with one or more curves over ``x``.

    ``unit`` stands beside the title. ``form`` writes a value. ``x_names`` replaces the numbers under the axis by one
    name per point, set at equal distances. ``band`` is (name, lower, upper, colour), an area behind the curves.
    ``level`` is (name, value), a dashed horizontal. ``bridge`` draws curves across gaps, for values
    that not every x has. ``most`` is the largest value that can occur (1 for shares), which the axis then does not
    exceed. More than ``points`` points are averaged in groups, and areas then show from what to what each group goes.
    ``note`` is the caption, ``about`` what its question mark explains.
    """
    x, columns, ranges, group = _thin(
        x, [entry.values for entry in series] + ([band[1], band[2]] if band else []), points
    )
    curves = [
        Series(entry.name, values, entry.colour, entry.dash, entry.faint)
        for entry, values in zip(series, columns, strict=False)
    ]
    lost = sum(1 for entry in series for value in entry.values if value is not None and not _drawable(value))
    spans = [end for span in ranges[: len(series)] for end in span]
    finite = [value for values in columns + spans for value in values if value is not None] + (
        [level[1]] if level else []
    )
    if not finite:
        return _figure(title, unit, Markup('<p class="empty">No finite values.</p>'), "", note, about)
    low, high = min(finite), max(finite)
    if include_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    low, high = _widen(low, high)
    ticks = nice_ticks(low, high)
    if most is not None and high <= most:
        ticks = [tick for tick in ticks if tick <= most + 1e-9] or ticks
    width = WIDTH
    y_at = _scale(min(low, ticks[0]), max(high, ticks[-1]), height - BOTTOM, TOP)
    positions = list(range(len(x))) if x_names else list(x)
    inset = 18 if x_names else 0
    x_at = _scale(positions[0], positions[-1], LEFT + inset, width - RIGHT - inset)
    labels = list(zip(positions, x_names, strict=True)) if x_names else None

    parts = [_axes(ticks, y_at, form, _x_ticks(positions) if labels is None else labels, x_at, x_label, width, height)]
    if band:
        parts.append(_area(positions, columns[-2], columns[-1], x_at, y_at, band[3]))
    if level:
        y = y_at(level[1])
        parts.append(
            Markup('<line class="level" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, width - RIGHT, y, y)
        )
    for curve, (lows, highs) in zip(curves, ranges, strict=False):
        parts.append(_area(positions, lows, highs, x_at, y_at, curve.colour, "range"))
    for curve in curves:
        parts.append(_path(positions, curve, x_at, y_at, bridge))
        if markers or len(positions) == 1:
            parts += [
                Markup('<circle class="mark" style="fill:var(--{})" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
                    curve.colour, x_at(px), y_at(value)
                )
                for px, value in zip(positions, curve.values, strict=True)
                if value is not None
            ]
    hover = {
        "x": [round(x_at(px), 1) for px in positions],
        "label": x_label,
        "at": "|".join(x_names or map(compact_step, x)),
        "rows": [[c.name, c.colour, _joined(None if v is None else form(v) for v in c.values)] for c in curves],
    }
    if band:
        hover["rows"].append(
            [
                band[0],
                band[3],
                _joined(
                    None if None in (a, b) else f"{form(a)} to {form(b)}" for a, b in zip(*columns[-2:], strict=True)
                ),
            ]
        )
    keys = [(c.name, c.colour, "dash" if c.dash else "faint" if c.faint else "line") for c in curves] + (
        [(band[0], band[3], "area")] if band else []
    )
    keys += [(f"{level[0]} {form(level[1])}", "muted", "dash")] if level else []
    extra = [f"Each point is the mean of {group}, areas span their smallest and largest."] if group > 1 else []
    extra += [f"{lost} values were NaN or infinite and are left out."] if lost else []
    return _figure(
        title,
        unit,
        _svg(title, parts, hover, width, height),
        _legend(keys) if len(keys) > 1 else "",
        " ".join(filter(None, (note, *extra))),
        about,
    )


def stacked_chart(
    title: str,
    unit: str,
    x: Sequence[float],
    layers: Sequence[Series],
    *,
    note: str = "",
    about: str = "",
    x_label: str = "training step",
) -> Markup:
    """A figure of ``layers`` (values >= 0) piled up at every x, as steps, one column per x; None counts as 0."""
    x, columns, _, group = _thin(x, [layer.values for layer in layers], MAX_POINTS)
    piles = [[value or 0.0 for value in values] for values in columns]
    totals = [sum(values) for values in zip(*piles, strict=True)]
    width = WIDTH
    ticks = nice_ticks(0.0, max(totals) or 1.0)
    y_at = _scale(0.0, ticks[-1], HEIGHT - BOTTOM, TOP)
    column = (width - LEFT - RIGHT) / len(x)
    x_at = _scale(0.0, float(len(x)), LEFT, width - RIGHT)
    wanted = dict.fromkeys(name for _, name in _x_ticks(x))
    names = [(index + 0.5, compact_step(value)) for index, value in enumerate(x) if compact_step(value) in wanted]
    names = names or [(index + 0.5, compact_step(x[index])) for index in range(0, len(x), math.ceil(len(x) / 6))]
    parts = [_axes(ticks, y_at, compact, names, x_at, x_label, width, HEIGHT)]
    base = [0.0] * len(x)
    for layer, values in zip(layers, piles, strict=True):
        top = [under + value for under, value in zip(base, values, strict=True)]
        outline = "".join(f"L{x_at(i):.1f} {y_at(t):.1f}H{x_at(i) + column:.1f}" for i, t in enumerate(top))
        floor = "".join(
            f"L{x_at(i) + column:.1f} {y_at(b):.1f}H{x_at(i):.1f}" for i, b in reversed(list(enumerate(base)))
        )
        parts.append(
            Markup('<path class="layer" style="fill:var(--{})" d="M{}{}Z"/>').format(layer.colour, outline[1:], floor)
        )
        base = top
    hover = {
        "x": [round(x_at(i + 0.5), 1) for i in range(len(x))],
        "label": x_label,
        "at": "|".join(map(compact_step, x)),
        "rows": [
            [layer.name, layer.colour, _joined(map(compact, values))]
            for layer, values in zip(layers, piles, strict=True)
        ]
        + [["total", "ink", _joined(map(compact, totals))]],
    }
    legend = _legend([(layer.name, layer.colour, "area") for layer in layers])
    extra = f"Each column is the mean of {group} steps." if group > 1 else ""
    return _figure(
        title, unit, _svg(title, parts, hover, width, HEIGHT), legend, " ".join(filter(None, (note, extra))), about
    )


def moving_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of the ``window`` values that end at each place (fewer at the start), gaps and non-finite values left
    out."""
    result: list[float | None] = []
    for end in range(1, len(values) + 1):
        part = [value for value in values[max(0, end - window) : end] if value is not None and math.isfinite(value)]
        result.append(sum(part) / len(part) if part else None)
    return result


def compact_step(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.1f}"


def _drawable(value: float) -> bool:
    """Finite, and small enough for differences of two such values to be finite as well."""
    return abs(value) < 1e300


def _joined(values: Iterable[str | None]) -> str:
    """One string in place of a list: quotes take five characters each in an attribute."""
    return "|".join(value or "" for value in values)


def _thin(
    x: Sequence[float], columns: Sequence[Sequence[float | None]], points: int
) -> tuple[list[float], list[list[float | None]], list[tuple[list[float | None], list[float | None]]], int]:
    """At most ``points`` points: consecutive ones averaged in groups. Returns x, columns (gaps as None), the smallest
    and largest values of the groups of each column (none without groups), and the group's size."""
    group = math.ceil(len(x) / points)
    columns = [[value if value is not None and _drawable(value) else None for value in column] for column in columns]
    if group <= 1:
        return list(x), columns, [([], []) for _ in columns], 1
    chunked = [
        [[v for v in column[i : i + group] if v is not None] for i in range(0, len(column), group)]
        for column in columns
    ]
    means = [[sum(chunk) / len(chunk) if chunk else None for chunk in chunks] for chunks in chunked]
    ranges = [
        ([min(chunk, default=None) for chunk in chunks], [max(chunk, default=None) for chunk in chunks])
        for chunks in chunked
    ]
    return [x[min(i + group, len(x)) - 1] for i in range(0, len(x), group)], means, ranges, group


def _widen(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, wide enough for ticks that differ in floating point."""
    size = max(abs(low), abs(high))
    # Below this, differences lose their digits or vanish.
    if size < 1e-290:
        return 0.0, 1.0
    if high - low > 1e-9 * size:
        return low, high
    return low - 0.1 * size, high + 0.1 * size


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if high == low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _x_ticks(positions: Sequence[float]) -> list[tuple[float, str]]:
    low, high = positions[0], positions[-1]
    if low == high:
        return [(low, compact_step(low))]
    ticks = [tick for tick in nice_ticks(low, high, 8) if low <= tick <= high]
    if all(position == int(position) for position in positions):
        ticks = [tick for tick in ticks if tick == int(tick)]
    return [(tick, compact_step(tick)) for tick in ticks]


def _axes(
    ticks: Sequence[float],
    y_at: Callable[[float], float],
    form: Callable[[float], str],
    names: Sequence[tuple[float, str]],
    x_at: Callable[[float], float],
    x_label: str,
    width: int,
    height: int,
) -> Markup:
    steps = [later - tick for tick, later in zip(ticks, ticks[1:], strict=False)]
    write = _tick_form(form, min(steps) if steps else 1.0, max(map(abs, ticks)))
    rows = Markup("").join(
        Markup(
            '<line class="grid{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" '
            'text-anchor="end">{}</text>'
        ).format(
            " zero" if tick == 0 else "",
            LEFT,
            width - RIGHT,
            y_at(tick),
            y_at(tick),
            LEFT - 7,
            y_at(tick) + 3.5,
            write(tick),
        )
        for tick in ticks
    )
    bottom = height - BOTTOM
    columns = Markup("").join(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x_at(at), bottom + 15, name)
        for at, name in names
    )
    middle = (LEFT + width - RIGHT) / 2
    return (
        rows
        + columns
        + Markup('<text class="axis" x="{:.0f}" y="{}" text-anchor="middle">{}</text>').format(
            middle, height - 4, x_label
        )
    )


def _tick_form(form: Callable[[float], str], step: float, largest: float) -> Callable[[float], str]:
    """Ticks need as many decimals as their distance, no more."""
    if form is percent:
        decimals = max(0, -math.floor(math.log10(100 * step) + 1e-9))
        return lambda value: f"{100 * value:.{decimals}f}%"
    if form is compact and (largest < 1e-3 or largest >= 1e7):
        return lambda value: "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if form is compact:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return lambda value: f"{value:,.{decimals}f}"
    return form


def _runs(positions: Sequence[float], *columns: Sequence[float | None]) -> list[list[tuple[float, ...]]]:
    """The stretches of points without a gap in any column."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for point in zip(positions, *columns, strict=True):
        if None in point:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _path(
    positions: Sequence[float],
    curve: Series,
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    bridge: bool,
) -> Markup:
    runs = _runs(positions, curve.values)
    if bridge and runs:
        runs = [[point for run in runs for point in run]]
    d = "".join(
        "M" + "L".join(f"{x_at(px):.1f} {y_at(value):.1f}" for px, value in (run if len(run) > 1 else run * 2))
        for run in runs
    )
    kind = "curve faint" if curve.faint else "curve"
    dash = Markup(' stroke-dasharray="{}"').format(curve.dash) if curve.dash else ""
    return Markup('<path class="{}" style="stroke:var(--{})"{} d="{}"/>').format(kind, curve.colour, dash, d)


def _area(
    positions: Sequence[float],
    lower: Sequence[float | None],
    upper: Sequence[float | None],
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    colour: str,
    kind: str = "band",
) -> Markup:
    if not any(value is not None for value in lower):
        return Markup("")
    d = ""
    for run in _runs(positions, lower, upper):
        edge = [f"{x_at(px):.1f} {y_at(high):.1f}" for px, _, high in run] + [
            f"{x_at(px):.1f} {y_at(low):.1f}" for px, low, _ in reversed(run)
        ]
        d += "M" + "L".join(edge) + "Z"
    return Markup('<path class="{}" style="fill:var(--{})" d="{}"/>').format(kind, colour, d)


def _svg(title: str, parts: Sequence[Markup], hover: dict, width: int, height: int) -> Markup:
    data = json.dumps(hover, separators=(",", ":"), ensure_ascii=False)
    cross = Markup('<line class="cross" y1="{}" y2="{}"/>').format(TOP, height - BOTTOM)
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" data-chart="{}">').format(
        width, height, title, data
    )
    return opening + Markup("").join(parts) + cross + Markup("</svg>")


def _legend(keys: Sequence[tuple[str, str, str]]) -> Markup:
    items = Markup("").join(
        Markup('<li><i class="key {}" style="--c:var(--{})"></i>{}</li>').format(kind, colour, name)
        for name, colour, kind in keys
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
