"""What the report draws, as positions that its template only has to place, and how it says numbers."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

INK = (47, 124, 200)  # the blue of masks and heat maps, which has contrast on a white and on a black page
FASTER = 1.05  # speed-ups nearer to 1 than this are within what timings move from run to run


def line_chart(
    name: str,
    lines: Sequence[tuple[str, list[tuple[float, float]]]],
    *,
    x_name: str,
    x_ticks: list[tuple[float, str]] | None = None,
    log: bool = False,
    zero: bool = False,
    reference: tuple[float, str] | None = None,
    mark: float | None = None,
    band: tuple[float, float] | None = None,
    labels: str | None = None,
    dots: bool = True,
) -> dict[str, Any]:
    """A line chart as positions in a 400 x 240 picture, for the template to draw as SVG.

    lines are (style, points) by rising x; mark is an x, band a range of x, reference a y with its name, labels the format of a
    text at each point, zero whether y starts there.
    """
    left, right, top, bottom = 46, 386, 26, 200
    xs = [x for _, line in lines for x, _ in line]
    ys = [y for _, line in lines for _, y in line] + ([reference[0]] if reference else [])
    ticks = ticks_between(0.0 if zero else min(ys), max(ys))
    low, high = min(ticks[0], *ys), max(ticks[-1], *ys)
    warp = math.log if log else float
    first, span = warp(min(xs)), (warp(max(xs)) - warp(min(xs))) or 1.0

    def across(x: float) -> float:
        return round(left + 20 + (right - left - 40) * (warp(x) - first) / span, 1)

    def up(y: float) -> float:
        return round(bottom - (bottom - top) * (y - low) / ((high - low) or 1.0), 1)

    if x_ticks is None:
        x_ticks = [(x, f"{x:,.0f}") for x in ticks_between(min(xs), max(xs)) if min(xs) <= x <= max(xs)]
    drawn_ticks, last = [], -math.inf
    for x, text in x_ticks:
        if across(x) - last >= 30:
            drawn_ticks.append({"at": across(x), "text": text})
            last = across(x)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    drawn = []
    for style, line in lines:
        circles, labelled = [], -math.inf
        for x, y in line:
            text = labels.format(y) if labels and across(x) - labelled >= 24 else ""
            labelled = across(x) if text else labelled
            circles.append({"x": across(x), "y": up(y), "text": text, "title": f"{x_name} {three(x)}: {three(y)}"})
        path = "M" + "L".join(f"{circle['x']} {circle['y']}" for circle in circles)
        drawn.append({"style": style, "path": path, "dots": circles if dots and len(line) <= 40 else []})
    return {
        "name": name,
        "x_name": x_name,
        "lines": drawn,
        "x_ticks": drawn_ticks,
        "y_ticks": [{"at": up(y), "text": f"{y:,.{digits}f}"} for y in ticks],
        "reference": _reference(drawn, up(reference[0]), reference[1], left + 4, right) if reference else None,
        "mark": across(mark) if mark is not None and min(xs) <= mark <= max(xs) else None,
        "band": (across(band[0]), across(band[1])) if band else None,
    }


def _reference(lines: list[dict], at: float, text: str, left: int, right: int) -> dict[str, Any]:
    """A line across the picture at height `at`, and where its name meets neither a curve nor what is written at its points."""
    width, taken = 8 * len(text), []  # [(x, y)]: places that ink covers
    for line in lines:
        places = [(float(x), float(y)) for x, y in (point.split() for point in line["path"][1:].split("L"))]
        for (x, y), (x1, y1) in zip(places, places[1:] or places, strict=False):
            taken += [(x + (x1 - x) * i / 20, y + (y1 - y) * i / 20) for i in range(21)]
        taken += [(dot["x"] + dx, dot["y"] - 14) for dot in line["dots"] if dot["text"] for dx in (-18, -6, 6, 18)]

    def clear(x: float) -> bool:
        return not any(x - 4 <= tx <= x + width + 4 and at - 24 <= ty <= at for tx, ty in taken)

    return {"at": at, "text": text, "x": next(filter(clear, range(left, right - width, 4)), left)}


def dumbbells(rows: list[dict], reference: float | None = None) -> dict[str, Any]:
    """Rows with scores a and b (either may be None) as percentages along one zoomed axis, for the template to place."""
    values = [row[key] for row in rows for key in ("a", "b") if row[key] is not None]
    values += [reference] if reference is not None else []
    ticks = ticks_between(100 * min(values), 100 * max(values))
    low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return round(100 * (100 * value - low) / ((high - low) or 1.0), 2)

    drawn = []
    for row in rows:
        a, b = row["a"], row["b"]
        both = a is not None and b is not None
        drawn.append(
            {
                "name": row["name"],
                "note": row["note"],
                "a": None if a is None else place(a),
                "b": None if b is None else place(b),
                "from": min(place(a), place(b)) if both else 0,
                "length": abs(place(a) - place(b)) if both else 0,
                "a_text": percent1(a) if a is not None else "",
                "b_text": percent1(b) if b is not None else "",
                "change": signed(100 * (b - a)) if both else "",
                "worse": both and b < a,
            }
        )
    return {
        "rows": drawn,
        "ticks": [
            {"at": place(tick / 100), "text": f"{tick:.0f}%" if float(tick).is_integer() else f"{tick:.1f}%"}
            for tick in ticks
        ],
        "reference": None if reference is None else place(reference),
        "reference_text": percent1(reference) if reference is not None else "",
    }


def ticks_between(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at or below low to at or above high, in steps of 1, 2 or 5 times a power of ten."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def png(alpha: np.ndarray) -> str:
    """A data URI of a PNG in the one ink of the page, with alpha [rows, columns] in 0..255 as its opacity."""
    opacity = np.rint(alpha).astype(np.uint8)
    pixels = np.empty((*opacity.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = INK, opacity
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter type 0 before each row

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", opacity.shape[1], opacity.shape[0], 8, 6, 0, 0, 0)  # 8 bits, RGBA
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def number(value: Any) -> float:
    """value as a float; TypeError or ValueError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return float(value)


def percent(share: float) -> str:
    """0.2 -> 20%, 0.125 -> 12.5%, 0.004 -> 0.4%."""
    return f"{round(100 * number(share), 1):g}%"


def percent1(share: float) -> str:
    return f"{100 * number(share):.1f}%"


def signed(value: float) -> str:
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else ("+" if value > 0 else "−") + text


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 1.2 else f"{ratio:.1f}×"


def faster(ratio: float) -> str:
    return (
        "same"
        if 1 / FASTER < ratio < FASTER
        else f"{times(ratio)} faster"
        if ratio > 1
        else f"{times(1 / ratio)} slower"
    )


def three(value: float) -> str:
    """Three significant digits, and never an exponent: 0.0312, 4.62, 78.5, 1,204."""
    value = number(value)
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def bytes_text(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{three(count / size)} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    seconds = round(number(seconds))
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"


def said_text(value: Any) -> str:
    """A value of the analysis as text: lists by their items, mappings by their pairs."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said_text(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(said_text(item) for item in value)
    return "none" if value is None else str(value)
