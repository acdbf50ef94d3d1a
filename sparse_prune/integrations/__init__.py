"""Where people already work: Hugging Face, peft.

Importing sparse_prune imports none of it: `watch()` waits for transformers' Auto classes. So after `import sparse_prune` alone,
be it before or after transformers, `from_pretrained` knows packed checkpoints and Garlic.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings

# What is imported as soon as a module of theirs has been: each registers itself with what that module holds.
_AFTER = {
    "transformers.quantizers.auto": "sparse_prune.integrations.hf",
    "transformers.models.auto.configuration_auto": "sparse_prune.models.garlic_config",
    "transformers.models.auto.modeling_auto": "sparse_prune.models.garlic",
    "peft.tuners.lora.model": "sparse_prune.integrations.peft",
}


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the modules of _AFTER as the other finders do, and runs ours when one has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name not in _AFTER:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            _register(_AFTER[name])

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


def _register(name: str) -> None:
    """Import a module of ours; a version of theirs that it does not fit must still be importable, so a failure is a warning."""
    try:
        importlib.import_module(name)
    except Exception as error:
        warnings.warn(f"sparse_prune: {name} found no place to register: {error!r}", stacklevel=2)


def watch() -> None:
    """Register with transformers and peft: now where they are loaded, else when they are."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name, ours in _AFTER.items():
        if name in sys.modules:
            _register(ours)
