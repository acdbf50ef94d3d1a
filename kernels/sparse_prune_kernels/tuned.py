"""Tilings that were measured on a GPU: near such a measurement they stand in for the arithmetic of config.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import LinearConfig

NEAR = 1.0  # M, N, K and density count as near up to this many doublings each


@dataclass(frozen=True)
class Measured:
    """The fastest tiling of y[m, n] = x[m, k] @ W^T, blocks of r x c, that was found for one density of blocks.

    Of a gradient dx[m, n] = dy[m, k] @ W where transposed: n, k and r x c are those of W^T.
    """

    itemsize: int  # of the weight's numbers: float16 and bfloat16 share their tilings
    blocksize: tuple[int, int]
    m: int
    n: int
    k: int
    density: float
    config: LinearConfig
    transposed: bool = False


Source = Callable[[str], Sequence[Measured]]
epoch = 0  # changes with every table
_source: Source | None = None
_tables: dict[str, Sequence[Measured]] = {}


def use(source: Source | None) -> None:
    """Ask source for the measurements of a device, by its name, when its first call comes; forget earlier ones."""
    global epoch, _source
    _source, epoch = source, epoch + 1
    _tables.clear()


def nearest(
    device: str,
    itemsize: int,
    blocksize: tuple[int, int],
    m: int,
    n: int,
    k: int,
    density: float,
    transposed: bool = False,
) -> LinearConfig | None:
    """The tiling measured nearest to that problem on that device, None where none is near."""
    if device not in _tables:
        _tables[device] = () if _source is None else _source(device)
    kind = (itemsize, blocksize, transposed)
    found = [row for row in _tables[device] if (row.itemsize, row.blocksize, row.transposed) == kind]
    wanted = (m, n, k, max(density, 1e-3))

    def doublings(row: Measured) -> list[float]:
        have = (row.m, row.n, row.k, max(row.density, 1e-3))
        return [abs(math.log2(a / b)) for a, b in zip(have, wanted, strict=True)]

    near = [(sum(distance), place) for place, row in enumerate(found) if max(distance := doublings(row)) <= NEAR]
    return found[min(near)[1]].config if near else None
