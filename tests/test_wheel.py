"""What a wheel promises, checked on the library that was built here; `make wheel` checks the wheel itself."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

import sparse_prune

SPEC = importlib.util.spec_from_file_location("check_wheel", Path(__file__).with_name("check_wheel.py"))
check_wheel = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_wheel)


def test_library_needs_only_stable_symbols():
    libraries = sorted(Path(sparse_prune.__file__).parent.glob("_C_*.so"))
    if not libraries:
        pytest.skip("the C++ extension was not built")
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    for library in libraries:
        listing = check_wheel.run("nm", "-D", "--undefined-only", library)
        assert "aoti_torch_get_dim" in listing
        assert check_wheel.foreign_symbols(listing) == []
        assert library.name.endswith(".abi3.so")


def test_foreign_symbols_are_found():
    listing = "\n".join(
        [
            "                 U aoti_torch_get_dim",
            "                 U memcpy@GLIBC_2.14",
            "                 U _ZN3c105ErrorC1ENS_14SourceLocationESs",
            "                 U _ZNK2at6Tensor4sizeEl",
            "                 U PyObject_Call",
            "                 w _ITM_deregisterTMCloneTable",
        ]
    )
    found = ["_ZN3c105ErrorC1ENS_14SourceLocationESs", "_ZNK2at6Tensor4sizeEl", "PyObject_Call"]
    assert check_wheel.foreign_symbols(listing) == found


def test_a_failed_step_stops_with_its_output():
    with pytest.raises(SystemExit, match="No such file"):
        check_wheel.run("ls", "/nothing/here", env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"})
