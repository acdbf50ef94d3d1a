"""Packed checkpoints: safetensors files of a model whose linear layers are SparseLinear, and writing that leaves no half file.

docs/format.md describes the layout. In short: the model's state dict as it is (a SparseLinear `name` gives `name.values`
[nnzb, R, C], `name.crow_indices`, `name.col_indices` and perhaps `name.bias`), and metadata that says its version, and the shape
and block size of each layer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .bsr import QUANTIZED, VALUE_DTYPES, BsrWeight, check_finite, check_x_scale, dtype_name, validate_bsr
from .convert import announce, swap_modules
from .errors import SparsePruneError
from .fuse import fuse_encoder_
from .layers import SparseLinear
from .linears import is_linear, matrix_shape
from .masks import check_blocksize, grid_shape, suggest_blocksize

Model = TypeVar("Model", bound=nn.Module)
VERSIONS = ("1", "2", "3", "4")  # floating point alone; with int8; with float8 or weight_only; with static scales of x
METHOD = "sparse_prune"  # quant_method in the config.json of a packed Hugging Face model
WEIGHTS_NAME = "model.safetensors"
MASKS_NAME, MASKS_VERSION = "masks.safetensors", "1"
# Of json.loads: bytes that are no text and numbers of thousands of digits are ValueErrors too; brackets may be nested too deep.
_BAD_JSON = (ValueError, RecursionError)
_LARGEST = 2**28  # of a size that a file tells: sizes in bytes of what is made for it then stay inside int64
_DAMAGED = "the file is damaged or was not made by sparse-prune: pack the model again"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling of a file to write to; it takes the file's name when the block ends, and goes away if it fails.

    A link is followed. Raises IsADirectoryError where path is one.
    """
    path = _followed(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling directory that replaces the directory path when the block ends, and goes away if it fails.

    A link is followed.
    """
    path = _followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, retired / path.name)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _followed(path: str | os.PathLike) -> Path:
    """path, or where it is a link what that leads to: the link, perhaps to another disk, stays."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write data as indented UTF-8 JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Parsed JSON of a file; raises SparsePruneError that names the file where it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SparsePruneError(str(path), "a file", "nothing there", "check the path") from None
    except _BAD_JSON as error:
        raise SparsePruneError(str(path), "JSON in UTF-8", str(error), "write it again") from None


def save_packed(model: nn.Module, path: str | os.PathLike) -> Path:
    """Write model (with its SparseLinear layers packed) as a safetensors file, and return the file's path.

    path is a file name ending in .safetensors, or a directory, which gets `model.safetensors` and, for a Hugging Face model, a
    `config.json` that says the checkpoint is packed. Raises SparsePruneError if the model has no SparseLinear, or a state that is
    no tensor.
    """
    path, file = Path(path), weights_file(path)
    if not describe_layers(model):
        raise SparsePruneError("model", "at least one SparseLinear", "none", "call sparsify_(model, ...) first")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[object, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            remedy = "save it apart, and the model without its get_extra_state"
            raise SparsePruneError(
                f"model: {name}", "a tensor, as a safetensors file holds", type(tensor).__name__, remedy
            )
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if key in owner:
            aliases[name] = owner[key]
        else:
            owner[key] = name
            tensors[name] = tensor.detach().contiguous()
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:  # a part of another: the file holds both whole
            tensors[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    metadata = layout_metadata(model)
    if aliases:
        metadata["aliases"] = json.dumps(aliases)
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata)
    named: Any = model  # a Hugging Face model has a config and a dtype
    if file != path and hasattr(getattr(model, "config", None), "to_diff_dict"):
        about: dict[str, Any] = {"architectures": [type(model).__name__], "dtype": dtype_name(named.dtype)}
        about |= {"quantization_config": layout_config(model)}
        write_json(path / "config.json", named.config.to_diff_dict() | about)
    return file


@dataclass(frozen=True)
class PackedLayer:
    """What a file says of one SparseLinear: shape (N, K), blocksize (R, C), number of blocks, and how they were quantized.

    dtype is one of QUANTIZED, or None for blocks in floating point; weight_only and x_scale as in BsrWeight.
    """

    shape: tuple[int, int]
    blocksize: tuple[int, int]
    nnzb: int
    dtype: torch.dtype | None = None
    weight_only: bool = False
    x_scale: float | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that hold the weight: NAME.part."""
        return ("crow_indices", "col_indices", "values", *(("scales",) if self.dtype else ()))

    def check_dtype(self, values: Tensor, name: str) -> None:
        """Raise SparsePruneError where values are quantized in another way than the file says."""
        if self.dtype not in (None, values.dtype):
            raise SparsePruneError(name, f"dtype {self.dtype}, as the file says", values.dtype, _DAMAGED)

    def __str__(self) -> str:
        """As config.json says it, in one string: transformers copies and prints the whole of it three times while it loads."""
        (n, k), (r, c) = self.shape, self.blocksize
        how = f", {dtype_name(self.dtype)}{' weight_only' if self.weight_only else ''}" if self.dtype else ""
        scale = "" if self.x_scale is None else f" x_scale {self.x_scale!r}"
        return f"{n}x{k}, {self.nnzb} blocks of {r}x{c}{how}{scale}"

    def to_dict(self) -> dict[str, Any]:
        """As the metadata of a file say it."""
        entry: dict[str, Any] = {"shape": list(self.shape), "blocksize": list(self.blocksize), "nnzb": self.nnzb}
        entry |= {"dtype": dtype_name(self.dtype)} if self.dtype else {}
        entry |= {"weight_only": True} if self.weight_only else {}
        return entry | ({} if self.x_scale is None else {"x_scale": self.x_scale})

    @classmethod
    def parse(cls, entry: Any) -> PackedLayer:
        """What str() or to_dict() gave; raises KeyError, TypeError or ValueError for anything else."""
        if isinstance(entry, str):
            found = _BRIEF.fullmatch(entry)
            if found is None:
                raise ValueError(f"{entry[:80]!r} is not like '768x3072, 460 blocks of 32x32'")
            n, k, nnzb, r, c = map(int, found.groups()[:5])
            dtype, weight_only = found[6], found[7] is not None
            x_scale = None if found[8] is None else float(found[8])
        else:
            (n, k), (r, c), nnzb = entry["shape"], entry["blocksize"], entry["nnzb"]
            dtype, weight_only, x_scale = entry.get("dtype"), entry.get("weight_only", False), entry.get("x_scale")
        if not all(type(v) is int and 0 < v <= _LARGEST for v in (n, k, r, c)):
            raise ValueError(f"sizes are integers from 1 to {_LARGEST}")
        if type(nnzb) is not int or not 0 <= nnzb <= math.prod(grid_shape((n, k), (r, c))):
            raise ValueError("there are at least 0 blocks, and no more than the shape has")
        if dtype not in _QUANTIZED_NAMES and (dtype is not None or "dtype" in entry):
            raise ValueError(f"dtype {dtype!r} is not known")
        if type(weight_only) is not bool or (weight_only and dtype != "int8"):
            raise ValueError(f"weight_only is {weight_only!r} beside dtype {dtype!r}")
        if x_scale is not None and type(x_scale) is not float:
            raise ValueError(f"x_scale is {x_scale!r}")
        values = None if dtype is None else _QUANTIZED_NAMES[dtype]
        check_x_scale(x_scale, values or torch.float32, weight_only)
        return cls((n, k), (r, c), nnzb, values, weight_only, x_scale)


_QUANTIZED_NAMES = {dtype_name(dtype): dtype for dtype in QUANTIZED}
_BRIEF = re.compile(
    r"(\d+)x(\d+), (\d+) blocks of (\d+)x(\d+)(?:, (\w+)( weight_only)?(?: x_scale ([\d.e+-]+))?)?", re.ASCII
)


def describe_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Name -> what a file says of it, for each SparseLinear of model."""
    return {
        name: PackedLayer(
            (layer.out_features, layer.in_features),
            layer.blocksize,
            layer.values.shape[0],
            layer.values.dtype if layer.values.dtype in QUANTIZED else None,
            layer.weight_only,
            layer.x_scale,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear)
    }


def version_of(layers: Mapping[str, PackedLayer]) -> str:
    """The lowest version of the layout that holds layers."""
    if any(entry.x_scale is not None for entry in layers.values()):
        return VERSIONS[3]
    kinds = {(entry.dtype, entry.weight_only) for entry in layers.values()}
    first, second = {(None, False)}, {(None, False), (torch.int8, False)}
    return VERSIONS[0 if kinds <= first else 1 if kinds <= second else 2]


def check_version(version: object, argument: str, got: object = None) -> None:
    """Raise SparsePruneError unless version is one of VERSIONS; got is what to say came where it is not a version."""
    if version not in VERSIONS:
        expected = f"a packed checkpoint of version {', '.join(VERSIONS[:-1])} or {VERSIONS[-1]}"
        raise SparsePruneError(
            argument, expected, got or version, "make it with `sparse-prune pack`, or update sparse-prune"
        )


def layout_metadata(model: nn.Module) -> dict[str, str]:
    """The metadata of a packed safetensors file of model."""
    layers = describe_layers(model)
    text = json.dumps({name: entry.to_dict() for name, entry in layers.items()})
    return {"format": "pt", "sparse_prune": version_of(layers), "layers": text}


def layout_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` in the config.json of a packed Hugging Face model."""
    layers = describe_layers(model)
    told = {name: str(entry) for name, entry in layers.items()}
    return {"quant_method": METHOD, "version": version_of(layers), "layers": told}


def describe_file(path: str | os.PathLike) -> dict[str, Any]:
    """What a safetensors file, or every one in a directory, holds, read one tensor at a time.

    {"files", "bytes", "version": the packed layout's or None, "layers": [...], "other_bytes"}. A packed file's layers have name,
    shape, blocksize, density (of elements), dtype and bytes, and their indices are checked. Other files' matrices have name, shape,
    dtype, bytes, zeros (fraction) and, where whole blocks are zero, blocksize and density as `suggest_blocksize` finds them.

    Raises SparsePruneError where a file is missing or damaged.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SparsePruneError(str(path), "a safetensors file or a directory with some", "none", "check the path")
    version, other = None, 0
    layers: list[dict[str, Any]] = []
    handles: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        packed: dict[str, Any] = {}
        for file in files:
            handle = _opened(file, stack)
            metadata = handle.metadata() or {}
            if "sparse_prune" in metadata:
                packed |= _described(file, metadata)
                version = metadata["sparse_prune"]
            handles |= dict.fromkeys(handle.keys(), handle)

        def read(name: str) -> Tensor:
            if name not in handles:
                raise SparsePruneError(f"{path}: {name}", "a tensor", "none", _DAMAGED)
            return _tensor(path, handles.pop(name), name)

        for name, entry in packed.items():
            arrays: dict[str, Any] = {part: read(f"{name}.{part}") for part in entry.parts}
            weight = BsrWeight(entry.shape, entry.blocksize, **arrays, weight_only=entry.weight_only)
            validate_bsr(entry.shape, entry.blocksize, **arrays, name=f"{path}: {name}", weight_only=entry.weight_only)
            blocks = {"blocksize": list(entry.blocksize), "density": weight.density}
            layers.append(_row(name, weight, weight.nbytes) | blocks)
        for name in sorted(handles):
            tensor = read(name)
            nbytes = tensor.numel() * tensor.element_size()
            # float4 is two numbers in a byte, which PyTorch can only store.
            matrix = tensor.ndim == 2 and tensor.is_floating_point() and tensor.dtype != torch.float4_e2m1fn_x2
            if packed or not matrix or not tensor.numel():
                other += nbytes
                continue
            found = suggest_blocksize(tensor)
            layers.append(_row(name, tensor, nbytes) | {"zeros": float((tensor == 0).float().mean())})
            if found is not None:
                layers[-1] |= {"blocksize": list(found.blocksize), "density": found.density}
    return {
        "files": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "version": version if packed else None,
        "layers": layers,
        "other_bytes": other,
    }


def _row(name: str, weight: Tensor | BsrWeight, nbytes: int) -> dict[str, Any]:
    dtype = (weight.values if isinstance(weight, BsrWeight) else weight).dtype
    return {"name": name, "shape": list(weight.shape), "dtype": dtype_name(dtype), "bytes": nbytes}


class MappedFile:
    """A safetensors file in memory, mapped copy-on-write; header: name -> {"dtype", "shape", "data_offsets"}.

    Each tensor is a view of the map with a storage of its own, like safetensors', in a seventh of the time: a packed model has four
    small ones for each layer. Raises SparsePruneError where the file is missing or has no header.
    """

    _DTYPES = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
    }

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._start = 8 + int.from_bytes(self._map[:8], "little")
            self.header: dict[str, Any] = json.loads(self._map[8 : self._start])
            if not isinstance(self.header, dict):
                raise ValueError("its header is no table")
        except (OSError, *_BAD_JSON) as error:
            got = f"{type(error).__name__}: {error}"
            raise SparsePruneError(str(path), "a safetensors file", got, _DAMAGED) from None

    def tensor(self, name: str, apart: bool = False) -> Tensor:
        """The tensor of that name; apart: a copy, read without touching the map, so that no page of it joins this process's memory.

        Raises SparsePruneError where the header does not describe a part of the file, or a dtype that packed layers have not.
        """
        try:
            entry = self.header[name]
            dtype, shape, (begin, end) = self._DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count, offset = math.prod(shape), self._start + begin
            inside = 0 <= begin <= end <= len(self._map) - self._start and min(shape, default=0) >= 0
            if not inside or end - begin != count * dtype.itemsize:
                raise ValueError(f"{entry}")
            if not count:
                return torch.empty(shape, dtype=dtype)
            buffer: Any = self._map
            if apart:
                buffer = bytearray(end - begin)
                with open(self.path, "rb") as file:
                    file.seek(offset)
                    file.readinto(buffer)
                offset = 0
            elif offset % dtype.itemsize:
                buffer, offset = bytearray(self._map[offset : self._start + end]), 0
            flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
            return flat if len(shape) == 1 else flat.view(shape)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise SparsePruneError(f"{self.path}: {name}", "a tensor of a packed layer", got, _DAMAGED) from None


def _opened(file: Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, "pt"))
    except (safetensors.SafetensorError, OSError) as error:
        raise SparsePruneError(str(file), "a safetensors file", f"{type(error).__name__}: {error}", _DAMAGED) from None


def _tensor(file: Path, handle: Any, name: str) -> Tensor:
    try:
        return handle.get_tensor(name)
    except safetensors.SafetensorError as error:  # a dtype that PyTorch has not
        raise SparsePruneError(f"{file}: {name}", "a tensor", error, _DAMAGED) from None


def is_packed(path: str | os.PathLike) -> bool:
    """Whether path (a file, or a directory with model.safetensors or its shards) is a packed checkpoint by its metadata.

    Raises SparsePruneError where the file is damaged.
    """
    file = weights_files(path)[0]
    if not file.is_file():
        return False
    with contextlib.ExitStack() as stack:
        return "sparse_prune" in (_opened(file, stack).metadata() or {})


def load_packed(model: Model, path: str | os.PathLike, mmap: bool = False) -> Model:
    """Load a packed checkpoint into model, in place, and return it; an encoder that it knows runs fused (`fuse_encoder_`).

    model is the architecture with its linear layers dense or sparse; those that the file lists become SparseLinear of the file's
    pattern. It may have been built under `torch.device("meta")`: no dense weight then ever exists. The file is untrusted: indices,
    shapes and dtypes are checked before any layer changes.

    mmap    keep the tensors as views of the mapped file, in the file's dtype and on the CPU: pages are read when first touched
            and shared between processes; the file must not change while the model lives. A meta model always loads so.

    Raises SparsePruneError where the file is missing, damaged, of a newer version, or does not fit the model.
    """
    files = weights_files(path)
    file = files[0] if len(files) == 1 else Path(path)
    tensors, metadata = read_tensors(files[0])
    for shard in files[1:]:
        tensors |= read_tensors(shard)[0]
    described = _described(file, metadata)
    aliases = _metadata_json(file, metadata, "aliases")
    # Before anything is checked: an alias may name a part of a sparse layer.
    for name, source in aliases.items() if isinstance(aliases, dict) else [("aliases", aliases)]:
        if not isinstance(source, str) or source not in tensors:
            raise SparsePruneError(f"{file}: {name}", f"the tensor {source} that it shares", "none", _DAMAGED)
        tensors[name] = tensors[source]
    assign = mmap or any(parameter.is_meta for parameter in model.parameters())
    layers = {}
    for name, entry in described.items():
        arrays = {}
        for part in entry.parts:
            if f"{name}.{part}" not in tensors:
                raise SparsePruneError(f"{file}: {name}.{part}", "a tensor", "none", _DAMAGED)
            arrays[part] = tensors[f"{name}.{part}"]
        validate_bsr(entry.shape, entry.blocksize, **arrays, name=f"{file}: {name}", weight_only=entry.weight_only)
        entry.check_dtype(arrays["values"], f"{file}: {name}.values")
        found = arrays["values"].shape[0]
        if found != entry.nnzb:
            raise SparsePruneError(f"{file}: {name}.values", f"{entry.nnzb} blocks", found, _DAMAGED)
        layers[name] = _make_layer(model, file, name, entry, arrays, tensors.get(f"{name}.bias"), assign)
    new = {}
    for name, layer in layers.items():
        old = model.get_submodule(name)
        new[old] = layer.train(old.training)
    named = model.named_modules(remove_duplicate=False)
    _check_fit(model, file, {name: new[module] for name, module in named if module in new}, tensors)
    swap_modules(model, new)
    model.load_state_dict(tensors, assign=assign)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise SparsePruneError(
            f"model: {left[0]}", "a tensor that the file holds", "one on the meta device", "build the model on the CPU"
        )
    fuse_encoder_(model)
    announce(model)
    return model


def save_masks(masks: Mapping[str, Tensor], blocksize: tuple[int, int], path: str | os.PathLike) -> None:
    """Write block masks (module name -> bool [ceil(N/R), ceil(K/C)]) as a safetensors file of uint8."""
    with atomic_path(path) as temporary:
        tensors = {name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}
        save_file(tensors, temporary, {"sparse_prune_masks": MASKS_VERSION, "blocksize": json.dumps(list(blocksize))})


def load_masks(path: str | os.PathLike) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The masks and the block size that save_masks wrote; raises SparsePruneError where the file is not such a file."""
    tensors, metadata = read_tensors(Path(path))
    if metadata.get("sparse_prune_masks") != MASKS_VERSION:
        raise SparsePruneError(
            str(path), "a file of block masks", "other safetensors", "make it with `sparse-prune prune`"
        )
    try:
        blocksize = check_blocksize(json.loads(metadata["blocksize"]))
    except (KeyError, *_BAD_JSON):
        raise SparsePruneError(str(path), "a blocksize in the metadata", metadata.get("blocksize"), _DAMAGED) from None
    for name, mask in tensors.items():
        if mask.dtype != torch.uint8 or mask.ndim != 2 or (mask > 1).any():
            got = f"{dtype_name(mask.dtype)} {tuple(mask.shape)}, or numbers above 1"
            raise SparsePruneError(f"{path}: {name}", "a matrix of 0 and 1 in uint8", got, _DAMAGED)
    return {name: mask.bool() for name, mask in tensors.items()}, blocksize


def weights_file(path: str | os.PathLike) -> Path:
    """path itself if it names a .safetensors file, else the weights inside the directory."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME


def weights_files(path: str | os.PathLike) -> list[Path]:
    """[weights_file(path)], or where a directory has shards in its place, these."""
    file = weights_file(path)
    shards = [] if file.is_file() else sorted(file.parent.glob(f"{file.stem}-*-of-*{file.suffix}"))
    return shards or [file]


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; raises SparsePruneError where it is missing or damaged."""
    if not file.is_file():
        raise SparsePruneError(str(file), "a safetensors file", "nothing there", "check the path")
    with contextlib.ExitStack() as stack:
        handle = _opened(file, stack)
        return {name: _tensor(file, handle, name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def parse_layers(described: Mapping[str, Any], source: str) -> dict[str, PackedLayer]:
    """What config.json or a file's metadata say of the layers; raises SparsePruneError naming source where it is malformed."""
    name = ""
    try:
        layers, known = {}, {}
        for name, entry in described.items():
            told = entry if isinstance(entry, str) else None  # a model's layers are of few kinds
            if told is None or told not in known:
                known[told] = PackedLayer.parse(entry)
            layers[name] = known[told]
        return layers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = f"{name}: {error!r}" if name else f"{error!r}"
        raise SparsePruneError(source, "a description of the packed layers", got, _DAMAGED) from None


def check_bias(bias: Tensor | None, outputs: int | None, name: str) -> None:
    """Raise SparsePruneError unless bias is one number an output in floating point, or None where outputs is."""
    fits = bias is not None and tuple(bias.shape) == (outputs,) and bias.dtype in VALUE_DTYPES
    if not fits and bias is not outputs:
        expected = "none" if outputs is None else f"shape ({outputs},) in floating point"
        got = "none" if bias is None else f"{tuple(bias.shape)} in {dtype_name(bias.dtype)}"
        raise SparsePruneError(name, expected, got, _DAMAGED)


def fits_layer(module: nn.Module | None, shape: tuple[int, int]) -> TypeGuard[nn.Linear | SparseLinear]:
    """Whether module is a linear layer, dense or sparse, of that shape (N, K)."""
    if isinstance(module, SparseLinear):
        return (module.out_features, module.in_features) == shape
    return module is not None and is_linear(module) and matrix_shape(module) == shape


def _described(file: Path, metadata: Mapping[str, str]) -> dict[str, PackedLayer]:
    """The layers that a packed file lists in its metadata."""
    version = metadata.get("sparse_prune")
    check_version(version, str(file), version or "other safetensors")
    if "layers" not in metadata:
        raise SparsePruneError(f"{file}: metadata layers", "a description of the packed layers", "none", _DAMAGED)
    return parse_layers(_metadata_json(file, metadata, "layers"), str(file))


def _metadata_json(file: Path, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, "{}"))
    except _BAD_JSON as error:
        raise SparsePruneError(f"{file}: metadata {key}", "JSON", str(error), _DAMAGED) from None


def _make_layer(model, file, name, entry: PackedLayer, arrays, bias, assign) -> SparseLinear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    n, k = entry.shape
    fits = fits_layer(module, entry.shape)
    if not fits:
        got = f"{type(module).__name__} {module.extra_repr()}" if module is not None else "no such module"
        raise SparsePruneError(
            f"{file}: {name}", f"a linear layer of {k} -> {n} in the model", got, "build the model that was packed"
        )
    check_finite(arrays["values"], f"{file}: {name}.values")
    check_bias(bias, n if module.bias is not None else None, f"{file}: {name}.bias")
    if assign:
        return SparseLinear(k, n, **arrays, bias=bias, weight_only=entry.weight_only, x_scale=entry.x_scale)
    blank = arrays | {"values": torch.empty_like(arrays["values"])}
    blank_bias = None if bias is None else torch.empty_like(bias)
    layer = SparseLinear(k, n, **blank, bias=blank_bias, weight_only=entry.weight_only, x_scale=entry.x_scale)
    dtype = module.compute_dtype if isinstance(module, SparseLinear) else module.weight.dtype
    return layer.to(next(module.parameters()).device, dtype)


def _check_fit(model: nn.Module, file: Path, layers: Mapping[str, SparseLinear], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless tensors has exactly what the model's state dict will have once layers are in place."""
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        expected |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    for name in sorted(set(expected) | set(tensors)):
        wanted, got = _told(expected.get(name), "no such tensor"), _told(tensors.get(name), "none")
        if wanted != got:
            raise SparsePruneError(f"{file}: {name}", wanted, got, "build the model that was packed")


def _told(tensor: Tensor | None, absent: str) -> str:
    """Shape and kind of a tensor: the same for those that can be copied into one another."""
    if tensor is None:
        return absent
    kind = "integers" if not (tensor.is_floating_point() or tensor.is_complex()) else dtype_name(tensor.dtype)
    return f"{tuple(tensor.shape)} in {'floating point' if tensor.dtype in VALUE_DTYPES else kind}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
