"""Recipes: the options of a run in one YAML file, by the names that the command line has for them.

task: sentiment
density: 0.2
block: 32x32
learning-rate: 1.0e-4
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import SparsePruneError
from .serialization import atomic_path

RECIPE_NAME = "recipe.yaml"


def read_recipe(path: str | os.PathLike, allowed: Collection[str]) -> dict[str, Any]:
    """Option -> value of a recipe file; raises SparsePruneError where it is missing, is not YAML, or names another option."""
    import yaml

    path = Path(path)
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SparsePruneError("--recipe", "a YAML file", f"nothing at {path}", "check the path") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SparsePruneError(
            "--recipe", "a YAML file", " ".join(str(error).split()), "write `option: value` lines"
        ) from None
    if not isinstance(options, dict):
        raise SparsePruneError(
            str(path), "`option: value` lines", type(options).__name__, "see a run's own recipe.yaml"
        )
    for name, value in options.items():
        if name not in allowed:
            raise SparsePruneError(str(path), f"options out of {', '.join(sorted(allowed))}", repr(name), "see --help")
        if not isinstance(value, str | int | float | bool):
            raise SparsePruneError(f"{path}: {name}", "one value", repr(value), "write it as on the command line")
    return options


def write_recipe(path: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """Write options, so that read_recipe gives them back."""
    import yaml

    plain = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
