"""What a wheel promises, checked on the library that was built here; `make wheel` checks the wheel itself."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
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


@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("readelf"), reason="there is no binutils")
def test_a_wheel_without_the_kernels_it_should_hold_is_refused(tmp_path):
    library = next(iter(Path(sparse_prune.__file__).parent.glob("_C_cpu*.so")), None)
    if library is None:
        pytest.skip("the C++ extension was not built")

    def found(name: str, *libraries: str, cuda: bool = False) -> list[str]:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for inside in libraries:
                archive.write(library, f"sparse_prune/{inside}.abi3.so")
        return check_wheel.audit(tmp_path / name, cuda)

    assert found("a-cp310-abi3-x.whl", "_C_cpu") == []
    assert found("a-cp310-abi3-x.whl", "_C_cpu", "_C_cuda", cuda=True) == []
    assert found("a-cp310-abi3-x.whl", "_C_cpu", cuda=True) == ["the wheel holds no _C_cuda"]
    assert found("a-cp310-abi3-x.whl", "_C_cpu", "_C_cuda") == ["the wheel holds a _C_cuda"]
    assert found("a-cp310-x.whl", "_C_cpu") == ["a-cp310-x.whl is not tagged abi3"]
