"""Damaged files: whoever reads one refuses it in words, or what was read is sound and runs. Never another error, never a crash.

One strategy damages for all readers: bytes, cuts, what the header says of a tensor, metadata, indices and numbers, and config.json.
FUZZ=5000 pytest tests/test_fuzz.py looks further, at other damage in every run.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparse_prune as sp
from sparse_prune import serialization
from sparse_prune.cli import info

WHOLE = "whole.safetensors"
OURS = Path(sp.__file__).parent
LOOKED_FOR = int(os.environ.get("FUZZ", "0"))


def fuzz(examples: int):
    """@given(data) with as many examples, the same in every run; FUZZ of them, and others, where that is set."""
    how = settings(max_examples=LOOKED_FOR or examples, derandomize=not LOOKED_FOR)
    return lambda test: how(given(st.data())(test))


# JSON that json.dumps does not write: what is between the marks goes into the text as it is.
RAW = {"@huge@": "9" * 5000, "@deep@": "[" * 5000 + "]" * 5000, "@inf@": "1e999", "@nan@": "NaN", "@lone@": r'"\ud800"'}
DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4"),
)
JUNK = st.one_of(
    st.sampled_from([None, True, False, "", "x", [], {}, [1], {"a": 1}, 0.5, *RAW, *DTYPES]),
    st.sampled_from([0, 1, -1, 2, 127, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63), 2**70]),
    st.integers(-64, 4096),
    st.lists(st.integers(-1, 130), max_size=4),
)


def dumps(tree: Any) -> str:
    text = json.dumps(tree)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a tree of dicts and lists."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from nodes(tree[key])


def damage_json(draw: Callable, tree: Any) -> Any:
    """tree with one to three entries replaced by junk or another entry, renamed or dropped, or with a number in a text changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        places = list(nodes(tree))
        if not places:
            break
        # By depth first: one of few entries at the top is as likely as one of the many below.
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["junk", "another", "number", "drop", "rename"]))
        if kind == "drop":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "x", *(str(k) for _, k in places)]))] = holder.pop(key)
        elif kind == "number" and isinstance(holder[key], str) and re.search(r"\d", holder[key]):
            found = draw(st.sampled_from(list(re.finditer(r"\d+", holder[key]))))
            number = draw(st.one_of(st.integers(0, 200), st.sampled_from([2**31, 2**40, 2**63, int("9" * 4000)])))
            holder[key] = f"{holder[key][: found.start()]}{number}{holder[key][found.end() :]}"
        elif kind == "another":
            from_holder, from_key = draw(st.sampled_from(places))
            if isinstance(from_holder, list) or from_key in from_holder:
                holder[key] = json.loads(json.dumps(from_holder[from_key]))
        else:
            holder[key] = draw(JUNK)
    return tree


def damage_file(draw: Callable, raw: bytes) -> bytes:
    """The bytes of a safetensors file, damaged."""
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    kind = draw(st.sampled_from(["bytes", "cut", "header", "same size", "exchange", "metadata", "aliases", "numbers"]))
    tensors = [name for name in header if name != "__metadata__"]
    # The indices, where damage would lead a kernel out of its arrays, as often as all others.
    indices = [name for name in tensors if name.endswith("_indices")]
    entry = header[draw(st.sampled_from(indices if indices and draw(st.booleans()) else tensors))]
    if kind == "bytes":
        content = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            end = draw(st.sampled_from([8, 8 + size, len(raw)]))  # where it does most, more often
            content[draw(st.integers(0, end - 1))] = draw(st.integers(0, 255))
        return bytes(content)
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))] + draw(st.sampled_from([b"", bytes(64)]))
    if kind == "header":
        header = damage_json(draw, header)
    elif kind == "same size":  # which safetensors has no reason to refuse
        bits = {"64": ("F64", "I64", "U64", "C64"), "32": ("F32", "I32", "U32"), "16": ("F16", "BF16", "I16", "U16")}
        bits["8"] = ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0")
        alike = next(names for names in bits.values() if entry["dtype"] in names)
        count = math.prod(entry["shape"])
        shapes = [[count], [count, 1], [1, *entry["shape"]], entry["shape"][::-1], [2, count // 2], [count, 1, 1]]
        if draw(st.booleans()):
            entry["dtype"] = draw(st.sampled_from(alike))
        else:
            entry["shape"] = draw(st.sampled_from([shape for shape in shapes if math.prod(shape) == count]))
    elif kind == "exchange":
        first, second = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        header[first], header[second] = header[second], header[first]
    elif kind == "metadata":
        metadata = header["__metadata__"]
        for key in [key for key in metadata if metadata[key][:1] in "[{"]:
            metadata[key] = dumps(damage_json(draw, json.loads(metadata[key])))
        if draw(st.booleans()):
            junk = draw(st.sampled_from(["", "0", "[]", "{}", "4", *RAW.values()]))
            metadata[draw(st.sampled_from(list(metadata)))] = junk
        if draw(st.booleans()):
            del metadata[draw(st.sampled_from(list(metadata)))]
    elif kind == "aliases":
        names = st.one_of(st.sampled_from(tensors), st.sampled_from(["x", "", "0.values"]))
        aliases = draw(st.dictionaries(names, names, min_size=1, max_size=3))
        header["__metadata__"]["aliases"] = dumps(aliases)
        for name in aliases if draw(st.booleans()) else ():
            header.pop(name, None)
    else:
        begin, end = entry["data_offsets"]
        at = draw(st.integers(0, max(0, (end - begin) // 4 - 1))) * 4
        # In floating point NaN, -infinity, -0.0; in int32 its ends.
        special = [0xFFFFFFFF, 0, 0x7F7F7F7F, 0x7FC00000, 0xFF800000, 0x80000000, 0x7FFFFFFF]
        number = draw(st.one_of(st.sampled_from(special), st.integers(0, 40)))
        body[begin + at : min(end, begin + at + 4)] = number.to_bytes(4, "little")[: end - begin - at]
    text = dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def damage(data: st.DataObject, folder: Path) -> Path:
    """A damaged copy of the file WHOLE in folder."""
    file = folder / "damaged.safetensors"
    file.unlink(missing_ok=True)  # a file that is mapped keeps its bytes
    file.write_bytes(damage_file(data.draw, (folder / WHOLE).read_bytes()))
    return file


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What read() returns, or None where it was refused: by SparsePruneError, or in another library that none of ours called."""
    try:
        return read()
    except sp.SparsePruneError:
        return None
    except Exception as error:
        frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        if any(frame.is_relative_to(OURS) for frame in frames):
            raise
        return None


def sparse_layers(model: nn.Module) -> dict[str, sp.SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, sp.SparseLinear)}


@torch.no_grad()
def check_sound(model: nn.Module, inputs: dict[str, torch.Tensor], layers: set[str]) -> None:
    """model has those sparse layers, canonical and finite, and runs."""
    sparse = sparse_layers(model)
    assert sparse.keys() == layers
    for layer in sparse.values():
        layer.packed.validate()
        assert layer.packed.dequantize().values.isfinite().all()
    output = model(**inputs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    moderate = all(p.numel() == 0 or p.double().abs().amax() < 1e3 for p in model.state_dict().values())
    assert output.isfinite().all() or not moderate


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 20), nn.LayerNorm(20), nn.Linear(20, 3)).eval()


FORMS = {"float32": None, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


@pytest.fixture(scope="module", params=FORMS)
def packed(request, tmp_path_factory):
    """A folder with a packed file."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("fuzz"), build()
    sp.sparsify_(model, sp.BlockSparseConfig((8, 8), 0.5), lambda name, _: name != "4")
    if FORMS[request.param]:
        sp.quantize_(model, lambda name, _: name == "0", dtype=FORMS[request.param])
    sp.save_packed(model, folder / WHOLE)
    return folder


@fuzz(100)
def test_a_damaged_packed_file(packed, data):
    file = damage(data, packed)
    target, mmap = build(), data.draw(st.booleans())
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    loaded = read_or_refused(lambda: sp.load_packed(target, file, mmap=mmap))
    if loaded is None:
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    else:
        check_sound(loaded, {"input": torch.ones(3, 24)}, set(sparse_layers(loaded)))


@fuzz(20)
def test_info_of_a_damaged_file(packed, data):
    file = damage(data, packed)
    found = read_or_refused(lambda: serialization.describe_file(file))
    if found:
        info(file)
        assert all(0 <= row.get("density", 0) <= 1 and 0 <= row["bytes"] <= found["bytes"] for row in found["layers"])


@fuzz(40)
def test_a_damaged_file_that_is_mapped(packed, data):
    file = damage(data, packed)
    mapped = read_or_refused(lambda: serialization.MappedFile(file))
    for name in mapped.header if mapped else ():
        whole, apart = (read_or_refused(lambda apart=apart: mapped.tensor(name, apart)) for apart in (False, True))  # noqa: B023
        assert (whole is None) == (apart is None)
        if whole is not None:
            begin, end = mapped.header[name]["data_offsets"]
            assert whole.nbytes == end - begin <= file.stat().st_size
            assert torch.equal(whole.view(torch.uint8), apart.view(torch.uint8)) or not whole.ndim


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    masks = {"a.b": torch.eye(3, 4).bool(), "c": torch.ones(2, 1).bool()}
    serialization.save_masks(masks, (16, 32), folder / WHOLE)
    return folder


@fuzz(200)
def test_a_damaged_mask_file(mask_file, data):
    file = damage(data, mask_file)
    found = read_or_refused(lambda: serialization.load_masks(file))
    if found is not None:
        masks, blocksize = found
        assert all(type(size) is int and size > 0 for size in blocksize)
        assert all(mask.dtype == torch.bool and mask.ndim == 2 for mask in masks.values())


@pytest.fixture(scope="module", params=[None, "int8"])
def directory(request, tmp_path_factory):
    """A folder with a packed Hugging Face model, the class that loads it, and the names of its sparse layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=20)).eval()
    sp.sparsify_(model, sp.BlockSparseConfig((8, 8), 0.5), lambda name, _: "layer" in name)
    if request.param:
        sp.quantize_(model, lambda name, _: name.endswith("query"))
    folder = tmp_path_factory.mktemp("directory")
    model.save_pretrained(folder)
    shutil.copytree(folder, folder / "damaged")
    return folder, transformers.AutoModelForSequenceClassification, set(sparse_layers(model))


@fuzz(60)
def test_a_damaged_directory(directory, data):
    folder, auto, layers = directory
    weights, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    if data.draw(st.booleans()):
        weights = damage_file(data.draw, weights)
    else:
        described = config["quantization_config"]
        told = {key: described[key] for key in ("version", "layers")}
        config["quantization_config"] = {"quant_method": described["quant_method"], **damage_json(data.draw, told)}
    (folder / "damaged" / "model.safetensors").write_bytes(weights)
    (folder / "damaged" / "config.json").write_text(dumps(config))
    placed = {"device_map": {"": "cpu"}} if data.draw(st.booleans()) else {}
    model = read_or_refused(lambda: auto.from_pretrained(folder / "damaged", **placed))
    # transformers takes integers for the weights of dense layers.
    if model is not None and all(
        p.is_floating_point() or name.endswith(".values") for name, p in model.named_parameters()
    ):
        check_sound(model.eval(), {"input_ids": torch.ones(2, 4, dtype=torch.long)}, layers)
