"""Tilings of the Triton kernels that `sparse-prune tune` measured on a GPU (gpu_tuning.py): where they are kept, read and used.

One file per GPU model under the user's cache directory, beside the planner's tables. SPARSE_PRUNE_TUNING=off, or `shipped`, leaves
them out: tilings then come from arithmetic (sparse_prune_kernels/config.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from . import planner
from .errors import SparsePruneError

FORMAT = 1
_LIMITS = {"merge": 8, "block_m": 512, "block_k": 128, "group_m": 64, "split": 16, "num_warps": 16, "num_stages": 16}


def cache_file(device: str) -> Path:
    """Where the measurements of a GPU, by its name, are kept."""
    return planner.cache_file(device, "tiles")


def install() -> None:
    """Let the kernels ask for the measurements of a device when its first call comes; forget what they were told before."""
    try:
        from sparse_prune_kernels import tuned
    except ModuleNotFoundError:  # backends.NO_KERNELS tells
        return
    tuned.use(_rows_of)


def _rows_of(device: str) -> list[Any]:
    if planner.setting() in (planner.OFF, planner.SHIPPED) or not cache_file(device).exists():
        return []
    return load(cache_file(device))


def describe() -> str:
    """One sentence: which tilings the Triton kernels use on this machine's GPU; "" without a GPU."""
    if not torch.cuda.is_available():
        return ""
    path = cache_file(torch.cuda.get_device_name())
    rows = _rows_of(torch.cuda.get_device_name())
    return f"{len(rows)} measured, {path}" if rows else "by arithmetic; `sparse-prune tune` measures this GPU"


def load(path: str | Path) -> list[Any]:
    """The measurements (sparse_prune_kernels.tuned.Measured) in a file; raises SparsePruneError that says what is wrong in it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, not {FORMAT}")
        return [_measured(row) for row in data["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        remedy = "run `sparse-prune tune` again, or delete the file"
        raise SparsePruneError(str(path), "tilings that `sparse-prune tune` wrote", got, remedy) from None


def _measured(row: dict[str, Any]) -> Any:
    from sparse_prune_kernels.config import LinearConfig, merges
    from sparse_prune_kernels.tuned import Measured

    (r, c), config, gradient = row["blocksize"], LinearConfig(**row["tiling"]), row.get("gradient", False)
    if gradient:  # the same product with W^T
        r, c = c, r
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[row["dtype"]]
    for name, most in _LIMITS.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} must be an integer from 1 to {most}, not {value!r}")
    for name in ("block_m", "block_k", "num_warps"):
        if getattr(config, name) & (getattr(config, name) - 1):
            raise ValueError(f"{name} must be a power of two, not {getattr(config, name)}")
    skips = config.skip is False or (config.merge in (2, 4) and (itemsize, config.split, config.swap) == (2, 1, False))
    whole_blocks = itemsize == 2 and config.split == 1 and not config.skip and config.block_k <= c
    stays = config.persistent is False or (config.persistent is True and whole_blocks)
    if type(config.swap) is not bool or config.merge not in merges(r, itemsize) or not (skips and stays):
        raise ValueError(f"no kernel has the tiling {dataclasses.asdict(config)}")
    if config.block_k > max(c, 32 if itemsize == 1 else c) or (config.block_k < c and c % config.block_k):
        raise ValueError(f"block_k must divide blocks of {c} inputs, not be {config.block_k}")
    sizes = (row["M"], *((row["K"], row["N"]) if gradient else (row["N"], row["K"])), row["density"])
    if not all(isinstance(size, (int, float)) and size > 0 for size in sizes):
        raise ValueError(f"M, N, K and density must be positive numbers, not {sizes}")
    if type(gradient) is not bool:
        raise ValueError(f"gradient must be true or false, not {gradient!r}")
    return Measured(itemsize, (r, c), *sizes, config, gradient)
