"""One self-contained HTML page about a pruning run, and the helpers that collect what it draws from a model and its masks.

The page is made of `metrics.json` and `analysis.json` beside it. Its pictures are inline SVG and PNG that follow the reader's light
or dark mode, its text stays text in the reader's fonts (so Chinese tokens need no font here), and it fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .charts import (
    FASTER,
    bytes_text,
    dumbbells,
    faster,
    line_chart,
    number,
    percent,
    percent1,
    png,
    said_text,
    seconds_text,
    signed,
    three,
    times,
)
from .errors import SparsePruneError
from .linears import is_linear, matrix_shape
from .masks import check_mask, element_density, expand_mask
from .serialization import atomic_path, read_json

PAGE_NAME = "report.html"
METRICS = {"accuracy": "accuracy", "f1": "F1"}  # what metrics.json may call its score, and how a reader says it
TOLERANCE = {"accuracy": 1.5, "f1": 2.0}  # points that a pruned model may lose and still count as having kept its score
MASK_SIDE = 200  # CSS pixels for the longest side of the largest mask
MASK_CELLS = 256  # larger masks are pooled into this many cells a side
MAX_TOKENS = 64
MAX_EXAMPLES = 40
MAX_POINTS = 240  # of one line: more than a chart of 400 pixels can show
# Says which pair of tokens is under the pointer; the page's policy lets this script run, by its hash, and no other.
_HOVER = """
for (const figure of document.querySelectorAll("[data-tokens]")) {
  const tokens = JSON.parse(figure.dataset.tokens), scale = +figure.dataset.scale, note = figure.querySelector(".pointed");
  const idle = note.textContent, maps = [...figure.querySelectorAll("[data-weights]")];
  for (const map of maps) {
    const picture = map.querySelector("image"), clear = () => { note.textContent = idle; };
    picture.addEventListener("pointerleave", clear);
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect(), n = tokens.length;
      const column = Math.floor((event.clientX - box.left) / box.width * n);
      const row = Math.floor((event.clientY - box.top) / box.height * n);
      if (!(row in tokens && column in tokens)) return clear();
      const value = (m) => (m.dataset.weights.charCodeAt(row * n + column) - 40) / 80;
      const shown = maps.map((m) => m.dataset.name + " " + (value(m) ** 2 * scale).toFixed(2)).join(", ");
      note.textContent = tokens[row] + " \u2192 " + tokens[column] + ": " + shown;
    });
  }
}
"""
_HEAD_KEYS = "dense, sparse, seconds (or bytes, layers, per_class, throughput in analysis.json)"
_OWN_FORM = "the form that `sparse-prune prune` writes"


def render_report(directory: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Write the page about the run in directory to out (default: directory/report.html), whole or not at all; return its path.

    `metrics.json` is required; every part of `analysis.json` is optional, and the page names what it left out.

    Raises SparsePruneError where a file is missing, is not JSON or holds something of another form, or jinja2 is not installed.
    """
    directory = Path(directory)
    out = Path(out) if out is not None else directory / PAGE_NAME
    metrics, analysis = _load(directory)
    page = _template().render(**_view(directory, metrics, analysis))
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def collect_layers(
    model: nn.Module, masks: Mapping[str, Tensor], blocksize: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The "layers" of analysis.json: name, shape [N, K], blocksize [R, C], element density and the mask as strings of 0 and 1.

    masks maps names of linear layers of model to bool block masks [ceil(N/R), ceil(K/C)], as Pruner.masks does. Without blocksize
    each layer's is inferred from its grid, which is exact where blocks tile the weight.

    Raises SparsePruneError where a name is not in the model or a mask does not fit its weight.
    """
    layers = []
    for name, mask in masks.items():
        shape = _weight_shape(model, name)
        size = _blocksize(mask, shape, blocksize)
        layers.append(
            {
                "name": name,
                "shape": list(shape),
                "blocksize": list(size),
                "density": element_density(mask, size, shape),
                "mask": ["".join("01"[kept] for kept in row) for row in mask.tolist()],
            }
        )
    return layers


def collect_heads(
    model: nn.Module, masks: Mapping[str, Tensor], blocksize: Sequence[int] | None = None, num_heads: int | None = None
) -> list[dict[str, Any]]:
    """The "heads" of analysis.json: for each layer and head, the share of its weights that is kept, and whether it is alive.

    Head h owns rows h*d..(h+1)*d of its layer's q, k and v (each a linear layer, or a third of a fused `qkv` [3H, H]) and the
    same columns of `out`; with fewer k and v heads than q heads, neighbours share. It is dead, adding the same to every text,
    when all it owns of v or of out is pruned; without q or k it still averages over positions. A linear layer without a mask
    counts as kept whole. Layers are told apart by the first number in a module's name; num_heads is
    model.config.num_attention_heads unless given. Empty where no layer has all four.

    Raises SparsePruneError where the number of heads is unknown or does not divide the rows of q.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        part, index = _attention_part(name), _layer_number(name)
        if part is None or index is None or not (is_linear(module) or hasattr(module, "in_features")):
            continue
        shape = _weight_shape(model, name)
        if name in masks:
            kept = expand_mask(masks[name].cpu(), _blocksize(masks[name], shape, blocksize), shape)  # [N, K]
        else:
            kept = torch.ones(shape, dtype=torch.bool)
        # Every part as [rows or columns of the heads, the other direction].
        own = {part: kept.T if part == "out" else kept}
        layers.setdefault(index, {}).update(dict(zip("qkv", kept.chunk(3), strict=True)) if part == "qkv" else own)
    whole = {index: parts for index, parts in sorted(layers.items()) if set(parts) == {"q", "k", "v", "out"}}
    if num_heads is None:
        num_heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if not whole:
        return []
    if not isinstance(num_heads, int) or num_heads < 1:
        raise SparsePruneError(
            "num_heads", "the number of attention heads", num_heads, "pass num_heads, or a model whose config has it"
        )
    heads = []
    for index, parts in whole.items():
        rows = parts["q"].shape[0]
        if rows % num_heads:
            raise SparsePruneError("num_heads", f"a divisor of the {rows} rows of q", num_heads, "pass the model's own")
        size = rows // num_heads
        for head in range(num_heads):
            owned = {}
            for part, kept in parts.items():
                first = head * kept.shape[0] // rows * size  # a shared k or v has fewer rows than q
                owned[part] = kept[first : first + size]
            share = sum(int(kept.sum()) for kept in owned.values()) / sum(kept.numel() for kept in owned.values())
            alive = bool(owned["v"].any() and owned["out"].any())
            heads.append({"layer": index, "head": head, "kept": share, "alive": alive})
    return heads


def summary_picture(directory: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write a PNG about the run in directory: score, latency and size, dense beside sparse.

    Raises SparsePruneError where the files are missing or malformed, or matplotlib is not installed.
    """
    directory, out = Path(directory), Path(out)
    metrics, analysis = _load(directory)
    head = _build(directory / "metrics.json", _HEAD_KEYS, lambda: _headline(metrics, analysis))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise SparsePruneError(
            "matplotlib", "the package matplotlib", "not installed", "pip install 'sparse-prune[report]'"
        ) from None
    grey, blue, ink = "#6b7683", "#2264ab", "#1d2733"
    engine = ConstrainedLayoutEngine()
    figure = Figure(figsize=(9, 3.5), dpi=160, facecolor="white", layout=engine)
    figure.suptitle(head["short"], fontsize=12.5, fontweight="bold", color=ink)
    engine.set(wspace=0.12)
    bars = [(row["name"], row["values"], row["texts"]) for row in head["bars"]]
    for axes, (name, values, texts) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars, strict=True):
        drawn = axes.bar(["dense", "sparse"], values, color=[grey, blue], width=0.6)
        axes.bar_label(drawn, texts, padding=3, fontsize=10, color=ink)
        axes.set_title(name, fontsize=11, loc="left", color=ink)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(y=0.15)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(grey)
        axes.tick_params(colors=grey, labelsize=9)
        axes.xaxis.label.set_color(grey)
    with atomic_path(out) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return out


# From files to what the template shows


def _load(directory: Path) -> tuple[dict, dict]:
    file = directory / "metrics.json"
    if not file.is_file():
        remedy = "make it with `sparse-prune prune ... --out DIR`, then report on that DIR"
        raise SparsePruneError(str(file), "the metrics of a pruning run", "nothing there", remedy)
    metrics = read_json(file)
    beside = directory / "analysis.json"
    analysis = read_json(beside) if beside.is_file() else {}
    for path, data in ((file, metrics), (beside, analysis)):
        if not isinstance(data, dict):
            raise SparsePruneError(str(path), "a JSON object", type(data).__name__, "prune again to write it anew")
    for key in _SECTIONS:
        entries = analysis.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise SparsePruneError(
                f"{beside}: {key}", "a list of objects", f"{entries!r:.60}", "prune again, or mend the file"
            )
    return metrics, analysis


def _template():
    try:
        import jinja2
    except ImportError:
        raise SparsePruneError(
            "jinja2", "the package jinja2", "not installed", "pip install 'sparse-prune[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _build(path: Path, key: str, build: Callable[[], Any]) -> Any:
    """build(), with whatever a malformed value makes it raise told as the fault of `key` in the file."""
    try:
        return build()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        got = f"{type(error).__name__}: {error}"
        raise SparsePruneError(f"{path}: {key}", _OWN_FORM, got, "prune again, or mend the file") from error


def _view(directory: Path, metrics: dict, analysis: dict) -> dict[str, Any]:
    """All variables of the template."""
    file = directory / "analysis.json"
    head = _build(directory / "metrics.json", _HEAD_KEYS, lambda: _headline(metrics, analysis))
    rows = _build(directory / "metrics.json", _HEAD_KEYS, lambda: _table(metrics, analysis))
    sections: dict[str, Any] = {}
    missing = []
    for key, (title, build) in _SECTIONS.items():
        drawn = _build(file, key, partial(build, analysis, head)) if analysis.get(key) else None
        sections[key] = drawn
        if not drawn:
            missing.append(title)
    facts = _build(file, "machine, model", lambda: _facts(analysis))
    if not facts:
        missing.append("machine and versions")
    script = _HOVER if sections["attention"] else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "head": head,
        "rows": rows,
        "sections": sections,
        "missing": missing,
        "facts": facts,
        "script": script,
        "script_source": f"'sha256-{digest}'" if script else "'none'",
    }


def _headline(metrics: dict, analysis: dict) -> dict[str, Any]:
    """The verdict in words, and the numbers of it that other parts need."""
    dense, sparse = metrics["dense"], metrics["sparse"]
    key = next((key for key in METRICS if key in dense), None)
    if key is None:
        raise KeyError("accuracy or f1")
    metric = METRICS[key]
    before, after, density = number(dense[key]), number(sparse[key]), number(sparse["density"])
    change = 100 * (after - before)
    sizes = [tuple(layer["blocksize"]) for layer in analysis.get("layers") or []]
    unit = "weights" if sizes and set(sizes) == {(1, 1)} else "blocks"
    block = f"{sizes[0][0]}×{sizes[0][1]}" if len(set(sizes)) == 1 else None

    removed = f"{percent(1 - density)} of the encoder’s {unit} removed"
    score = f"{metric} unchanged" if abs(change) < 0.05 else f"{metric} {signed(change)} points"
    bars = [_bar(metric, before, after, percent1)]
    speed = pace = None
    if dense.get("latency_ms") is not None and sparse.get("latency_ms") is not None:
        speed = number(dense["latency_ms"]) / number(sparse["latency_ms"])
        pace = "no faster" if 1 / FASTER < speed < FASTER else faster(speed)
        bars.append(_bar("latency (ms)", dense["latency_ms"], sparse["latency_ms"], three))
    packed, whole = _bytes_of(metrics, analysis)
    if packed:
        bars.append(_bar("encoder size (MB)", packed[0] / 1e6, packed[1] / 1e6, three))
    elif whole:
        bars.append(_bar("size (MB)", whole[0] / 1e6, whole[1] / 1e6, three))

    supports = [int(row["support"]) for row in analysis.get("per_class") or []]
    held_out = sum(supports)
    tone, verdict = _verdict(metric, change, TOLERANCE[key], speed)
    if held_out and key == "accuracy" and before <= max(supports) / held_out:
        tone, verdict = (
            "bad",
            "The dense model is right no more often than one that always names the largest class: train it first.",
        )
    elif key == "f1" and before == 0:
        tone, verdict = "bad", "The dense model finds nothing: train it first."
    error = 100 * math.sqrt(max(before * (1 - before), 0) / held_out) if held_out and key == "accuracy" else None
    tiles = [
        (metric, percent1(after), f"dense {percent1(before)}"),
        ("speed", times(speed), f"{three(dense['latency_ms'])} → {three(sparse['latency_ms'])} ms") if speed else None,
        _size_tile("encoder size", packed) or _size_tile("size", whole),
        (
            "blocks kept" if unit == "blocks" else "weights kept",
            percent(density),
            f"in blocks of {block}" if block else "",
        ),
    ]
    return {
        "title": str(analysis.get("title") or f"Pruning for {metrics['task']}"),
        "task": str(metrics["task"]),
        "metric": metric,
        "tolerance": TOLERANCE[key],
        "short": f"{removed}" + (f", {pace}" if pace else "") + f", {score}",
        "words": [removed, *([pace] if pace else []), score],
        "tone": tone,
        "verdict": verdict,
        "held_out": f"{held_out:,}" if held_out else None,
        "error": f"{error:.1f}" if error else None,
        "tiles": [tile for tile in tiles if tile],
        "bars": bars,
        "before": before,
        "density": density,
    }


def _verdict(metric: str, change: float, tolerance: float, speed: float | None) -> tuple[str, str]:
    """Whether pruning paid off ("good", "mixed" or "bad"), and why, by the change of the score in points and the speed-up."""
    kept, fast = change >= -tolerance, speed is None or speed >= FASTER
    gained = "smaller" if speed is None else "smaller and faster"
    if kept and fast:
        return "good", f"It paid off: {gained}, with its {metric} kept within {tolerance:g} points."
    if fast:
        lost = f"it lost more {metric} than the {tolerance:g} points that count as kept."
        return "mixed", f"{gained.capitalize()}, but {lost}"
    if kept and speed is not None:
        slower = "not faster" if speed > 1 / FASTER else "slower"
        return "mixed", f"Smaller, with its {metric} kept, but {slower} on this machine."
    return "bad", "Neither as accurate nor faster: not worth using as it is."


def _table(metrics: dict, analysis: dict) -> list[dict[str, str]]:
    """Rows of name, note, dense, sparse and change."""
    dense, sparse, seconds = metrics["dense"], metrics["sparse"], metrics.get("seconds") or {}
    key = next(key for key in METRICS if key in dense)
    change = 100 * (number(sparse[key]) - number(dense[key]))
    rows = [
        _row(METRICS[key], "held out", percent1(dense[key]), percent1(sparse[key]), f"{signed(change)} points"),
        _row("density", "encoder weights kept", "100%", percent(sparse["density"]), ""),
    ]
    if dense.get("latency_ms") is not None and sparse.get("latency_ms") is not None:
        before, after = number(dense["latency_ms"]), number(sparse["latency_ms"])
        shape = next(
            (e for e in analysis.get("latency") or [] if (e.get("dense_ms"), e.get("sparse_ms")) == (before, after)),
            None,
        )
        note = f"batch {shape['batch']}, length {shape['length']}, {shape['dtype']}" if shape else ""
        rows.append(_row("latency", note, f"{three(before)} ms", f"{three(after)} ms", faster(before / after)))
    if rates := analysis.get("throughput"):
        before, after = number(rates["dense_per_s"]), number(rates["sparse_per_s"])
        rows.append(_row("throughput", "texts a second", three(before), three(after), faster(after / before)))
    packed, whole = _bytes_of(metrics, analysis)
    for name, note, pair in (
        ("encoder", "dense and packed", packed),
        ("whole file", "with embeddings and head", whole),
    ):
        if pair:
            rows.append(
                _row(f"{name}, bytes", note, bytes_text(pair[0]), bytes_text(pair[1]), f"{pair[1] / pair[0]:.2f}×")
            )
    if seconds:
        train, prune = (seconds_text(seconds[k]) if seconds.get(k) is not None else "" for k in ("train", "prune"))
        rows.append(_row("time spent", "training, then pruning", train, f"+ {prune}" if prune else "", ""))
    return rows


def _row(name: str, note: str, dense: str, sparse: str, change: str) -> dict[str, str]:
    return {"name": name, "note": note, "dense": dense, "sparse": sparse, "change": change}


def _bar(name: str, dense: float, sparse: float, form: Callable[[float], str]) -> dict[str, Any]:
    return {"name": name, "values": (number(dense), number(sparse)), "texts": (form(dense), form(sparse))}


def _bytes_of(metrics: dict, analysis: dict) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Bytes (dense, packed) of the encoder and of the whole file, each where known."""
    known = analysis.get("bytes") or {}
    pairs = []
    for name in ("encoder", "file"):
        pair = known.get(f"dense_{name}"), known.get(f"packed_{name}")
        pairs.append((number(pair[0]), number(pair[1])) if None not in pair else None)
    if pairs[1] is None and None not in (pair := (metrics["dense"].get("bytes"), metrics["sparse"].get("bytes"))):
        pairs[1] = number(pair[0]), number(pair[1])
    return pairs[0], pairs[1]


def _size_tile(name: str, pair: tuple[float, float] | None) -> tuple[str, str, str] | None:
    return (name, f"{pair[1] / pair[0]:.2f}×", f"{bytes_text(pair[0])} → {bytes_text(pair[1])}") if pair else None


# Sections: each takes the analysis and the headline, and returns what its part of the template shows


def _layers_section(analysis: dict, head: dict) -> dict[str, Any]:
    groups: dict[int | None, list[dict]] = {}
    weights, kept_weights, longest = 0, 0.0, 1
    for layer in analysis["layers"]:
        (n, k), (r, c), density = layer["shape"], layer["blocksize"], number(layer["density"])
        rows = layer["mask"]
        cells = np.frombuffer("".join(rows).encode("ascii"), np.uint8).reshape(len(rows), -1) - ord("0")  # [N/R, K/C]
        if cells.shape != (-(-n // r), -(-k // c)) or cells.max() > 1:
            raise ValueError(
                f"the mask of {layer['name']} is {cells.shape}, not a grid of 0 and 1 over {n}x{k} in {r}x{c}"
            )
        pool = -(-max(cells.shape) // MASK_CELLS)
        if pool > 1:
            padded = np.pad(cells, [(0, -side % pool) for side in cells.shape]).astype(float)
            cells = padded.reshape(padded.shape[0] // pool, pool, -1, pool).mean((1, 3))
        index = _layer_number(layer["name"])
        longest = max(longest, *cells.shape)
        weights, kept_weights = weights + n * k, kept_weights + n * k * density
        groups.setdefault(index, []).append(
            {
                "name": _within_layer(layer["name"]),
                "full": layer["name"],
                "note": f"{n} × {k}, blocks {r} × {c}",
                "size": n * k,
                "density": density,
                "cells": cells,
            }
        )
    pixels = max(1, min(8, MASK_SIDE // longest))
    every = [layer for group in groups.values() for layer in group]
    for layer in every:
        cells = layer.pop("cells")
        layer |= {
            "picture": png(cells * 255),
            "width": cells.shape[1] * pixels,
            "height": cells.shape[0] * pixels,
            "percent": percent(layer["density"]),
        }
    scale = max(max(layer["density"] for layer in every), 1e-9)
    for layer in every:
        layer["bar"] = 100 * layer["density"] / scale
    mean = kept_weights / weights
    kinds: dict[str, list[float]] = {}
    for layer in every:
        kept, size = kinds.setdefault(layer["name"], [0.0, 0.0])
        kinds[layer["name"]] = [kept + layer["density"] * layer["size"], size + layer["size"]]
    ranked = sorted((kept / size, name) for name, (kept, size) in kinds.items())
    said = f"{percent(mean)} of the weights are left."
    if len(ranked) > 1 and ranked[-1][0] - ranked[0][0] >= 0.005:
        (least, lowest), (most, highest) = ranked[0], ranked[-1]
        said += f" “{highest}” kept the most ({percent(most)}), “{lowest}” the least ({percent(least)})."
    groups_drawn = []
    for index, members in groups.items():
        kept = sum(layer["density"] * layer["size"] for layer in members) / sum(layer["size"] for layer in members)
        groups_drawn.append(
            {
                "name": "outside the layers" if index is None else f"Layer {index}",
                "kept": percent(kept),
                "layers": members,
            }
        )
    grid = pixels if pixels >= 4 else 0
    return {"said": said, "groups": groups_drawn, "mean": 100 * mean / scale, "mean_text": percent(mean), "grid": grid}


def _curve_points(analysis: dict) -> list[dict[str, float]]:
    """The points of the curve (density, score and, where it was timed, speed over dense) by rising density.

    Empty unless they reach density 1, which is dense.
    """
    points = sorted(analysis.get("curve") or [], key=lambda point: number(point["density"]))
    if len(points) < 2 or points[-1]["density"] != 1:
        return []

    def timed(point: dict) -> dict[str, float]:
        dense = point.get("dense_ms") or points[-1].get("latency_ms")
        return {"speed": number(dense) / number(point["latency_ms"])} if dense and point.get("latency_ms") else {}

    return [{"density": number(point["density"]), "score": number(point["score"])} | timed(point) for point in points]


def _curve_section(analysis: dict, head: dict) -> dict[str, Any] | None:
    points = _curve_points(analysis)
    if not points:
        return None
    tolerance, timed = head["tolerance"], [point for point in points if "speed" in point]
    options: dict[str, Any] = {"log": True, "x_name": "blocks kept (log scale)", "mark": head["density"]}
    options["x_ticks"] = [(point["density"], percent(point["density"])) for point in points]
    scores = [(point["density"], 100 * point["score"]) for point in points]
    drawn: dict[str, Any] = {"reference": (scores[-1][1], "dense"), "labels": "{:.1f}"}
    charts = [line_chart(f"{head['metric']}, %", [("sparse", scores)], **drawn, **options)]
    said = ""
    if len(timed) > 1:
        held = [point for point in timed if 100 * (point["score"] - points[-1]["score"]) >= -tolerance]
        best = max(held, key=lambda point: point["speed"])
        said = f"Within {tolerance:g} points of dense, the fastest is at {percent(best['density'])}: {times(best['speed'])}."
        if best is points[-1]:
            said = f"No pruned point is both within {tolerance:g} points of dense and faster than it."
        speeds = [(point["density"], point["speed"]) for point in timed]
        drawn = {"reference": (1.0, "dense"), "labels": "{:.1f}×", "zero": True}
        charts.append(line_chart("speed-up over dense", [("sparse", speeds)], **drawn, **options))
    return {"said": said, "charts": charts, "between": len(points) > 2}


def _latency_section(analysis: dict, head: dict) -> dict[str, Any]:
    rows = []
    for entry in analysis["latency"]:
        dense, sparse = number(entry["dense_ms"]), number(entry["sparse_ms"])
        top = max(dense, sparse)
        rows.append(
            {
                "name": f"{entry['batch']} × {entry['length']}",
                "note": str(entry["dtype"]),
                "dense": three(dense),
                "sparse": three(sparse),
                "dense_bar": 100 * dense / top,
                "sparse_bar": 100 * sparse / top,
                "change": faster(dense / sparse),
                "worse": dense / sparse < 1 / FASTER,
            }
        )
    ratios = [number(e["dense_ms"]) / number(e["sparse_ms"]) for e in analysis["latency"]]
    said = f"From {times(min(ratios))} to {times(max(ratios))} the speed of dense." if len(ratios) > 1 else ""
    fused = [
        number(e["dense_ms"]) / number(e["dense_fused_ms"]) for e in analysis["latency"] if e.get("dense_fused_ms")
    ]
    if fused:
        span = " to ".join(dict.fromkeys((times(min(fused)), times(max(fused)))))
        said += (
            f" Of this, attention and LayerNorm by kernels of ours give {span}: the dense model could have that too."
        )
    return {"rows": rows, "said": said, "slower": sum(row["worse"] for row in rows)}


def _class_section(analysis: dict, head: dict) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for entry in analysis["per_class"]:
        dense, sparse = number(entry["dense"]), number(entry["sparse"])
        rows.append(
            {"name": str(entry["name"]), "note": f"{int(entry['support']):,} held out", "a": dense, "b": sparse}
        )
    worst = min(rows, key=lambda row: row["b"] - row["a"])
    drop = 100 * (worst["b"] - worst["a"])
    said = f"{worst['name']} lost most: {signed(drop)} points." if drop <= -0.05 else "No class lost anything."
    return {"said": said, **dumbbells(rows)}


def _ablation_section(analysis: dict, head: dict) -> dict[str, Any]:
    by_criterion: dict[str, dict[str, Any]] = {}
    for entry in analysis["ablation"]:
        found = by_criterion.setdefault(str(entry["criterion"]), {"note": ""})
        found["b" if entry["distilled"] else "a"] = number(entry["score"])
        if entry.get("error") is not None:
            found["note"] += f"{', ' if found['note'] else ''}±{100 * number(entry['error']):.1f}"
    rows = [{"name": name, "a": None, "b": None} | found for name, found in by_criterion.items()]
    rows.sort(key=lambda row: -max(v for v in (row["a"], row["b"]) if v is not None))
    top = rows[0]
    distilled = top["b"] is not None and (top["a"] is None or top["b"] >= top["a"])
    said = f"Best: {top['name']}{' with distillation' if distilled else ' without distillation'}, "
    best = top["b"] if distilled else top["a"]
    said += f"{signed(100 * (best - head['before']))} points from dense. "
    density = analysis.get("ablation_density")
    said += "Short runs, all at the same density." if density is None else f"Short runs, all at density {density:g}."
    return {"said": said, **dumbbells(rows, head["before"])}


def _heads_section(analysis: dict, head: dict) -> dict[str, Any]:
    grid: dict[int, dict[int, dict]] = {}
    for entry in analysis["heads"]:
        grid.setdefault(int(entry["layer"]), {})[int(entry["head"])] = entry
    columns = range(max(max(row) for row in grid.values()) + 1)
    top = max(number(entry["kept"]) for entry in analysis["heads"]) or 1
    rows = []
    for layer, entries in sorted(grid.items()):
        cells = []
        for column in columns:
            entry = entries.get(column)
            kept = number(entry["kept"]) if entry else 0
            state = "none" if entry is None else "alive" if entry["alive"] else "dead"
            cells.append({"state": state, "text": percent(kept) if entry else "", "tint": round(60 * kept / top)})
        rows.append({"name": layer, "cells": cells})
    dead, total = sum(not entry["alive"] for entry in analysis["heads"]), len(analysis["heads"])
    said = f"All {total} heads are alive." if not dead else f"{dead} of {total} heads died."
    return {"said": said, "rows": rows, "columns": list(columns)}


def _attention_section(analysis: dict, head: dict) -> list[dict[str, Any]]:
    drawn = []
    for entry in analysis["attention"]:
        tokens = [str(token) for token in entry["tokens"]]
        maps = {name: np.asarray(entry[name], dtype=float) for name in ("dense", "sparse")}  # each [T, T]
        for name, weights in maps.items():
            if weights.shape != (len(tokens), len(tokens)) or not np.isfinite(weights).all() or not len(tokens):
                raise ValueError(f"{name} weights are {weights.shape} for {len(tokens)} tokens")
        shown = tokens[:MAX_TOKENS]
        maps = {name: weights.clip(0)[:MAX_TOKENS, :MAX_TOKENS] for name, weights in maps.items()}
        top = max(float(weights.max()) for weights in maps.values()) or 1.0
        # Most weights are near 0: by the square root a quarter of the largest one gets half its ink.
        inks = {name: np.sqrt(weights / top) for name, weights in maps.items()}
        drawn.append(
            {
                "tokens": [_SHORT.get(token, token) for token in shown],
                "cut": len(tokens) - len(shown),
                "layer": entry["layer"],
                "head": entry["head"],
                "label": entry.get("label"),
                "maps": [
                    {
                        "name": name,
                        "picture": png(ink * 255),
                        "weights": "".join(chr(40 + round(80 * value)) for value in ink.ravel()),
                        "prediction": entry.get(f"{name}_prediction"),
                        "right": entry.get(f"{name}_prediction") == entry.get("label"),
                    }
                    for name, ink in inks.items()
                ],
                "scale": top,
                "ticks": [f"{top * f * f:.2f}" for f in (0, 0.5, 1)],
                "moved": round(100 * float(np.abs(maps["dense"] - maps["sparse"]).sum(1).mean()) / 2),
            }
        )
    return drawn


def _history_section(analysis: dict, head: dict) -> dict[str, Any] | None:
    points, last, offset, phase = [], 0.0, 0.0, None
    for entry in analysis["history"]:
        step = number(entry["step"])
        if entry["phase"] != phase:
            phase, offset = entry["phase"], last if step <= last else 0.0
        last = step + offset
        points.append({"phase": phase, "step": last, **{k: entry.get(k) for k in ("loss", "density", "score")}})
    pruning = [point["step"] for point in points if point["phase"] == "prune"]
    band = (pruning[0], points[-1]["step"]) if pruning else None
    charts = []
    for key, name, factor in (
        ("loss", "loss", 1),
        ("density", "density, %", 100),
        ("score", f"{head['metric']}, %", 100),
    ):
        lines = []
        for phase, style in (("train", "dense"), ("prune", "sparse")):
            line = [(p["step"], factor * number(p[key])) for p in points if p["phase"] == phase and p[key] is not None]
            if line:
                lines.append((style, line[:: max(1, len(line) // MAX_POINTS)]))
        if sum(len(line) for _, line in lines) > 1:
            zero = key == "density"
            charts.append(line_chart(name, lines, x_name="step", band=band, zero=zero, dots=key == "score"))
    return (
        {"said": "Grey is training the dense model, blue is pruning it." if pruning else "", "charts": charts}
        if charts
        else None
    )


def _examples_section(analysis: dict, head: dict) -> dict[str, Any]:
    rows = []
    for entry in analysis["examples"]:
        label, dense, sparse = (said_text(entry[key]) for key in ("label", "dense", "sparse"))
        rows.append({"text": str(entry["text"]), "label": label, "dense": dense, "sparse": sparse})
    rows.sort(key=lambda row: row["dense"] == row["sparse"])
    lost = sum(row["dense"] == row["label"] != row["sparse"] for row in rows)
    won = sum(row["sparse"] == row["label"] != row["dense"] for row in rows)
    more = len(rows) - MAX_EXAMPLES
    said = f"Of these {len(rows)}, pruning broke {lost} and mended {won}."
    return {"said": said, "rows": rows[:MAX_EXAMPLES], "more": max(more, 0)}


def _facts(analysis: dict) -> list[tuple[str, str]]:
    """What the model is and what it ran on, as pairs of name and value."""
    pairs = []
    for group in ("model", "machine"):
        for key, value in (analysis.get(group) or {}).items():
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else said_text(value)
            pairs.append((key.replace("_", " "), shown))
    return pairs


_SECTIONS: dict[str, tuple[str, Callable[[dict, dict], Any]]] = {
    "curve": ("accuracy and speed over density", _curve_section),
    "latency": ("latency at each shape", _latency_section),
    "layers": ("where the density went", _layers_section),
    "per_class": ("what each class lost", _class_section),
    "heads": ("which heads died", _heads_section),
    "attention": ("attention before and after", _attention_section),
    "ablation": ("the ablation", _ablation_section),
    "history": ("the training history", _history_section),
    "examples": ("predictions before and after", _examples_section),
}
_SHORT = {"[CLS]": "⊢", "[SEP]": "⊣", "[UNK]": "□"}


# Names of modules


def _layer_number(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def _within_layer(name: str) -> str:
    """What follows the layer's number in a module's name, without the word attention: qkv, out, ffn_in."""
    rest = re.sub(r"^.*?(?:^|\.)\d+\.", "", name)
    return re.sub(r"^(attention|self_attn|attn)\.(self\.)?", "", rest)


def _attention_part(name: str) -> str | None:
    """Which part of attention a linear layer is, by the names that Garlic, BERT, GPT-2 and Llama and their kin give it."""
    found = re.search(r"(?:^|\.)(?:(qkv|c_attn)|(?:q_proj|q_lin|query)|(k_proj|k_lin|key)|(v_proj|v_lin|value))$", name)
    if found:
        return "qkv" if found[1] else "k" if found[2] else "v" if found[3] else "q"
    out = r"(?:attention\.out|attention\.output\.dense|attn\.c_proj|o_proj|out_proj|out_lin)$"
    return "out" if re.search(out, name) else None


def _weight_shape(model: nn.Module, name: str) -> tuple[int, int]:
    try:
        module: Any = model.get_submodule(name)
        return matrix_shape(module) if is_linear(module) else (module.out_features, module.in_features)
    except AttributeError:
        raise SparsePruneError(
            f"masks[{name!r}]", "the name of a linear layer", "none in the model", "use Pruner.masks"
        ) from None


def _blocksize(mask: Tensor, shape: tuple[int, int], blocksize: Sequence[int] | None) -> tuple[int, int]:
    if blocksize is None:
        blocksize = [-(-side // max(blocks, 1)) for side, blocks in zip(shape, mask.shape, strict=False)]
    check_mask(mask, shape, blocksize)
    r, c = blocksize
    return r, c
