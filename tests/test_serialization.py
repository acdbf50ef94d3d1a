from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import sparse_prune as sp
from sparse_prune import masks, serialization


def build():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 45), nn.LayerNorm(45), nn.Linear(45, 3)).eval()


@pytest.fixture
def packed_model():
    model = build()
    sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 32), density=0.5), filter_fn=lambda name, _: name != "4")
    return model


@pytest.mark.parametrize("target", ["model.safetensors", "directory"])
def test_round_trip_is_exact(packed_model, tmp_path, target):
    file = sp.save_packed(packed_model, tmp_path / target)
    assert file.is_file() and serialization.is_packed(tmp_path / target)
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode, "whoever may read other files may read this"
    loaded = sp.load_packed(build(), tmp_path / target)
    x = torch.randn(5, 64)
    assert torch.equal(loaded(x), packed_model(x))
    assert isinstance(loaded[0], sp.SparseLinear) and not loaded[0].training
    assert loaded.state_dict().keys() == packed_model.state_dict().keys()
    assert [p.name for p in tmp_path.rglob("*") if p.name.startswith(".")] == []
    again = sp.load_packed(loaded, file)
    assert torch.equal(again(x), packed_model(x))


def test_file_is_about_density_times_the_dense_one(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    dense = 2 * 512 * 512 * 4
    sp.sparsify_(model, sp.BlockSparseConfig(density=0.2))
    assert sp.save_packed(model, tmp_path / "m.safetensors").stat().st_size < 0.21 * dense


def test_tied_tensors_are_stored_once(tmp_path):
    def tied():
        model = nn.ModuleDict({"a": nn.Embedding(8, 64), "b": nn.Linear(64, 8, bias=False), "c": nn.Linear(64, 64)})
        model["b"].weight = model["a"].weight
        return model

    model = tied()
    sp.sparsify_(model, sp.BlockSparseConfig(density=0.5))
    file = sp.save_packed(model, tmp_path / "m.safetensors")
    assert sum(tuple(t.shape) == (8, 64) for t in safetensors.torch.load_file(file).values()) == 1
    loaded = sp.load_packed(tied(), file)
    assert loaded["a"].weight is loaded["b"].weight and torch.equal(loaded["a"].weight, model["a"].weight)


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_a_layer_under_two_names_is_stored_once_and_loaded_under_both(tmp_path, options):
    def twice():
        layer = nn.Linear(64, 64)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = twice()
    sp.sparsify_(model, sp.BlockSparseConfig(density=0.5))
    file = sp.save_packed(model, tmp_path / "m.safetensors")
    assert sum(tuple(t.shape[1:]) == (32, 32) for t in safetensors.torch.load_file(file).values()) == 1
    x = torch.randn(3, 64)
    for target in (twice(), model):
        expected = model(x)
        loaded = sp.load_packed(target, file, **options)
        assert isinstance(loaded[0], sp.SparseLinear) and loaded[2] is loaded[0]
        assert torch.equal(loaded(x), expected)
    separate = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(sp.SparsePruneError, match=r"2\.bias|2\.col_indices|2\.weight"):
        sp.load_packed(separate, file, **options)


def rewrite(file, change_tensors=lambda t: t, change_metadata=lambda m: m):
    tensors, metadata = serialization.read_tensors(file)
    safetensors.torch.save_file(change_tensors(tensors), file, change_metadata(metadata))


def _set(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def _flip_first_two(t):
    t = t.clone()
    t[0], t[1] = t[1].item(), t[0].item()
    return t


BROKEN_TENSORS = {
    "negative column": (_set("0.col_indices", lambda t: t - 5), "0.col_indices: expected entries from 0"),
    "column out of range": (_set("0.col_indices", lambda t: t + 1000), "0.col_indices: expected entries below 2"),
    "unsorted columns": (_set("2.col_indices", _flip_first_two), "2.col_indices: expected ascending"),
    "crow past the end": (_set("0.crow_indices", lambda t: t * 2), "0.crow_indices: expected a last entry of"),
    "crow too short": (_set("0.crow_indices", lambda t: t[:-1].clone()), "0.crow_indices: expected shape"),
    "values too few": (_set("0.values", lambda t: t[:-1].clone()), "0.crow_indices|0.col_indices"),
    "values of another block": (_set("0.values", lambda t: t[:, :8].clone()), "0.values: expected shape"),
    "NaN": (_set("0.values", lambda t: t * float("nan")), "0.values: expected finite numbers"),
    "layer tensor missing": (
        lambda t: {k: v for k, v in t.items() if k != "0.values"},
        "0.values: expected a tensor, got none",
    ),
    "bias missing": (lambda t: {k: v for k, v in t.items() if k != "0.bias"}, "0.bias: expected shape"),
    "other tensor missing": (
        lambda t: {k: v for k, v in t.items() if k != "3.weight"},
        r"3.weight: expected \(45,\) in floating point, got none",
    ),
    "bias of integers": (
        _set("0.bias", lambda t: t.int()),
        r"0.bias: expected shape \(96,\) in floating point, got .*int32",
    ),
    "weight of integers": (
        _set("4.weight", lambda t: t.long()),
        r"4.weight: expected \(3, 45\) in float.* in integers",
    ),
    "other tensor of another shape": (_set("4.weight", lambda t: t[:2].clone()), r"4.weight: expected \(3, 45\)"),
    "stranger": (lambda t: t | {"9.weight": torch.zeros(2)}, "9.weight: expected no such tensor"),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors_never_reach_the_model(packed_model, tmp_path, case):
    change, message = BROKEN_TENSORS[case]
    file = sp.save_packed(packed_model, tmp_path / "m.safetensors")
    rewrite(file, change)
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(sp.SparsePruneError, match=message):
        sp.load_packed(model, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


BROKEN_METADATA = {
    "newer": ({"sparse_prune": "5"}, "expected a packed checkpoint of version 1, 2, 3 or 4, got 5"),
    "no layers": ({"layers": "[1"}, "metadata layers: expected JSON"),
    "layers nested too deep": ({"layers": "[" * 5000}, "metadata layers: expected JSON"),
    "a number too long": ({"layers": '{"0": ' + "9" * 5000 + "}"}, "metadata layers: expected JSON"),
    "blocks without rows": (
        {"layers": '{"0": {"shape": [96, 64], "blocksize": [0, 32], "nnzb": 1}}'},
        "sizes are integers from 1 to",
    ),
    "more blocks than fit": (
        {"layers": '{"0": {"shape": [96, 64], "blocksize": [16, 32], "nnzb": 13}}'},
        "no more than the shape has",
    ),
    "layers are a list": ({"layers": "[1]"}, "expected a description of the packed layers"),
    "layers of another form": ({"layers": '{"0": {"shape": [1]}}'}, "expected a description of the packed layers"),
    "wrong nnzb": ({"layers": '{"0": {"shape": [96, 64], "blocksize": [16, 32], "nnzb": 1}}'}, "expected 1 blocks"),
    "negative shape": (
        {"layers": '{"0": {"shape": [-96, 64], "blocksize": [16, 32], "nnzb": 1}}'},
        "description of the packed layers",
    ),
    "layer not in the model": (
        {"layers": '{"7": {"shape": [96, 64], "blocksize": [16, 32], "nnzb": 1}}'},
        "7.crow_indices",
    ),
    "aliases are a list": ({"aliases": "[1]"}, "expected the tensor"),
    "alias of nothing": ({"aliases": '{"a": "b"}'}, "expected the tensor b that it shares"),
}


@pytest.mark.parametrize("case", BROKEN_METADATA)
def test_broken_metadata(packed_model, tmp_path, case):
    change, message = BROKEN_METADATA[case]
    file = sp.save_packed(packed_model, tmp_path / "m.safetensors")
    rewrite(file, change_metadata=lambda metadata: metadata | change)
    with pytest.raises(sp.SparsePruneError, match=message):
        sp.load_packed(build(), file)


def test_an_alias_is_checked_like_what_it_stands_for(tmp_path):
    """Indices of another layer, which for this one lead out of x."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    sp.sparsify_(
        model, sp.BlockSparseConfig((16, 16)), masks={"0": torch.eye(4, 2).bool(), "1": torch.eye(2, 4).bool().flip(1)}
    )
    file = sp.save_packed(model, tmp_path / "m.safetensors")
    rewrite(file, change_metadata=lambda metadata: metadata | {"aliases": '{"0.col_indices": "1.col_indices"}'})
    with pytest.raises(sp.SparsePruneError, match=r"0\.col_indices: expected entries below 2"):
        sp.load_packed(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), file)


def test_missing_and_foreign_files(packed_model, tmp_path):
    with pytest.raises(sp.SparsePruneError, match="expected a safetensors file, got nothing there"):
        sp.load_packed(build(), tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for read in (lambda file: sp.load_packed(build(), file), serialization.is_packed):
        with pytest.raises(sp.SparsePruneError, match=r"text\.safetensors: .* damaged"):
            read(tmp_path / "text.safetensors")
    safetensors.torch.save_file(build().state_dict(), tmp_path / "dense.safetensors")
    with pytest.raises(
        sp.SparsePruneError, match="expected a packed checkpoint of version 1, 2, 3 or 4, got other safetensors"
    ):
        sp.load_packed(build(), tmp_path / "dense.safetensors")
    assert not serialization.is_packed(tmp_path / "dense.safetensors")
    with pytest.raises(sp.SparsePruneError, match="a linear layer of 64 -> 96 in the model, got ReLU"):
        sp.load_packed(nn.Sequential(nn.ReLU()), sp.save_packed(packed_model, tmp_path / "m.safetensors"))


def test_saving_a_dense_model():
    with pytest.raises(sp.SparsePruneError, match="model: expected at least one SparseLinear, got none"):
        sp.save_packed(build(), "never-written.safetensors")


def test_nothing_half_written(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), serialization.atomic_dir(target) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (target / "old").read_text() == "old"
    with serialization.atomic_dir(target) as temporary:
        (temporary / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in target.iterdir()] == ["new"]


def test_json_round_trip_and_errors(tmp_path):
    serialization.write_json(tmp_path / "a.json", {"名": 1})
    assert serialization.read_json(tmp_path / "a.json") == {"名": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(sp.SparsePruneError, match="a.json: expected JSON in UTF-8"):
        serialization.read_json(tmp_path / "a.json")
    with pytest.raises(sp.SparsePruneError, match="b.json: expected a file, got nothing there"):
        serialization.read_json(tmp_path / "b.json")


def test_masks_round_trip(tmp_path):
    masks = {"a.b": torch.rand(3, 4) < 0.5, "c": torch.ones(1, 1, dtype=torch.bool)}
    serialization.save_masks(masks, (16, 32), tmp_path / "masks.safetensors")
    loaded, blocksize = serialization.load_masks(tmp_path / "masks.safetensors")
    assert blocksize == (16, 32) and all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    with safetensors.safe_open(tmp_path / "masks.safetensors", "pt") as handle:
        assert json.loads(handle.metadata()["blocksize"]) == [16, 32]


@pytest.mark.parametrize(
    ("change", "blocksize", "match"),
    [
        (lambda t: t, "[16, 0]", "a blocksize in the metadata, got"),
        (lambda t: t, "[1e999, 16]", "a blocksize in the metadata, got"),
        (lambda t: t, "[" * 5000, "a blocksize in the metadata, got"),
        (lambda t: t * 2, "[16, 16]", "m.safetensors: a: expected a matrix of 0 and 1 in uint8, got uint8"),
        (lambda t: t.float(), "[16, 16]", "a: expected a matrix of 0 and 1 in uint8, got float32"),
        (lambda t: t[0].clone(), "[16, 16]", r"a: expected a matrix of 0 and 1 in uint8, got uint8 \(3,\)"),
    ],
)
def test_damaged_masks_are_refused(tmp_path, change, blocksize, match):
    file = tmp_path / "m.safetensors"
    serialization.save_masks({"a": torch.eye(2, 3).bool()}, (16, 16), file)
    rewrite(file, _set("a", change), lambda metadata: metadata | {"blocksize": blocksize})
    with pytest.raises(sp.SparsePruneError, match=match):
        serialization.load_masks(file)


def test_mapped_tensors_are_views_of_the_file(packed_model, tmp_path):
    file = sp.save_packed(packed_model, tmp_path / "m.safetensors")
    loaded = sp.load_packed(build(), file, mmap=True)
    x = torch.randn(5, 64)
    assert torch.equal(loaded(x), packed_model(x))
    maps = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    for name, tensor in loaded.state_dict().items():
        assert any(low <= tensor.data_ptr() < high for low, high in maps), f"{name} is not in the mapped file"
    copied = sp.load_packed(build(), file)
    assert not any(low <= copied[0].values.data_ptr() < high for low, high in maps)


def test_a_model_on_the_meta_device_gets_the_files_tensors(packed_model, tmp_path):
    file = sp.save_packed(packed_model.bfloat16(), tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = build()
    loaded = sp.load_packed(empty, file)
    x = torch.randn(5, 64).bfloat16()
    assert loaded[0].values.dtype is torch.bfloat16 and torch.equal(loaded(x), packed_model(x))


def test_what_the_file_lacks_may_not_stay_on_the_meta_device(packed_model, tmp_path):
    file = sp.save_packed(packed_model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = build()
        empty.register_buffer("scratch", torch.zeros(3), persistent=False)
    with pytest.raises(sp.SparsePruneError, match="model: scratch: expected a tensor that the file holds"):
        sp.load_packed(empty, file)


def test_description_of_a_packed_file(packed_model, tmp_path):
    file = sp.save_packed(packed_model, tmp_path / "m.safetensors")
    found = serialization.describe_file(file)
    assert found["version"] == "1" and found["bytes"] == file.stat().st_size
    assert [(row["name"], row["shape"], row["blocksize"]) for row in found["layers"]] == [
        ("0", [96, 64], [16, 32]),
        ("2", [45, 96], [16, 32]),
    ]
    assert found["layers"][0]["density"] == pytest.approx(0.5)
    held = sum(row["bytes"] for row in found["layers"]) + found["other_bytes"]
    assert held == sum(t.numel() * t.element_size() for t in packed_model.state_dict().values())
    rewrite(file, _set("0.col_indices", lambda t: t + 1000))
    with pytest.raises(sp.SparsePruneError, match=r"0\.col_indices: expected entries below 2"):
        serialization.describe_file(file)
    rewrite(file, change_metadata=lambda metadata: {"sparse_prune": metadata["sparse_prune"]})
    with pytest.raises(
        sp.SparsePruneError, match="metadata layers: expected a description of the packed layers, got none"
    ):
        serialization.describe_file(file)
    rewrite(file, change_metadata=lambda metadata: {"sparse_prune": "5"})
    with pytest.raises(sp.SparsePruneError, match="expected a packed checkpoint of version 1, 2, 3 or 4, got 5"):
        serialization.describe_file(file)


def test_description_of_a_dense_checkpoint_suggests_blocks(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    mask = torch.rand(4, 4) < 0.4
    with torch.no_grad():
        model[0].weight.mul_(masks.expand_mask(mask, (32, 32), (128, 128)))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    found = serialization.describe_file(tmp_path)
    first, second = found["layers"]
    assert found["version"] is None and first["blocksize"] == [32, 32]
    assert first["zeros"] == pytest.approx(1 - float(mask.float().mean()), abs=1e-3)
    assert second["zeros"] == 0 and "blocksize" not in second


TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5, dtype=torch.int8),
    "c": torch.randn(3, 2, 2).bfloat16(),
    "d": torch.zeros(0, 4, 4),
    "e": torch.arange(4, dtype=torch.int32),
    "f": torch.randn(2, dtype=torch.float64),
    "g": torch.randn(3).half(),
}


def test_a_mapped_file_gives_what_safetensors_does(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "t.safetensors")
    mapped = serialization.MappedFile(tmp_path / "t.safetensors")
    for name, tensor in TENSORS.items():
        for got in (mapped.tensor(name), mapped.tensor(name, apart=True)):
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    storages = {mapped.tensor(name).untyped_storage().data_ptr() for name in "abcefg"}
    assert len(storages) == 6, "save_pretrained takes tensors of one storage for one tensor"
    view = mapped.tensor("a")
    view.add_(1)
    assert torch.equal(serialization.MappedFile(tmp_path / "t.safetensors").tensor("a"), TENSORS["a"])


def _write(file: Path, header: dict, data: bytes = bytes(64)) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def test_a_tensor_where_no_number_of_its_size_may_lie(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "pad": "x"}
    while (len(json.dumps(header)) + 8) % 4 != 1:
        header["pad"] += "x"
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    mapped = serialization.MappedFile(_write(tmp_path / "odd.safetensors", header, data))
    assert mapped.tensor("a").tolist() == [1.5, -2.0] and mapped.tensor("a").data_ptr() % 4 == 0


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [60, 68]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]},
        {"dtype": "F32", "shape": [2], "data_offsets": [2**80, 2**80 + 8]},
        {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
        None,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entry):
    mapped = serialization.MappedFile(_write(tmp_path / "lies.safetensors", {"a": entry}))
    for apart in (False, True):
        with pytest.raises(sp.SparsePruneError, match=r"lies.safetensors: a: expected a tensor"):
            mapped.tensor("a", apart)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 16, bytes(8), (8).to_bytes(8, "little") + b"[1, 2, 3]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(sp.SparsePruneError, match="f.safetensors: expected a safetensors file"):
        serialization.MappedFile(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((), ""),
        ((torch.int8,), ", int8"),
        ((torch.float8_e4m3fn,), ", float8_e4m3fn"),
        ((torch.int8, True), ", int8 weight_only"),
        ((torch.int8, False, 0.03125), ", int8 x_scale 0.03125"),
        ((torch.float8_e4m3fn, False, 1.25e-05), ", float8_e4m3fn x_scale 1.25e-05"),
    ],
)
def test_what_a_file_says_of_a_layer_is_read_back(how, said):
    entry = serialization.PackedLayer((768, 3072), (32, 64), 460, *how)
    for form in (str(entry), entry.to_dict(), json.loads(json.dumps(entry.to_dict()))):
        assert serialization.PackedLayer.parse(form) == entry
    assert str(entry) == "768x3072, 460 blocks of 32x64" + said
    for wrong in (f"{entry} ", f"{entry}, int4", "768x3072, 460 blocks of 32x64, float8_e4m3fn weight_only", "", "-1"):
        with pytest.raises(ValueError, match="is not|weight_only is True beside"):
            serialization.PackedLayer.parse(wrong)
    for x_scale in (0.0, -1.0, float("nan"), float("inf"), "0.1", True, 1):
        with pytest.raises(ValueError, match="x_scale"):
            serialization.PackedLayer.parse(entry.to_dict() | {"dtype": "int8", "x_scale": x_scale})
    for rest in ("", ", int8 weight_only"):
        with pytest.raises(ValueError, match="x_scale"):
            serialization.PackedLayer.parse(f"768x3072, 460 blocks of 32x64{rest} x_scale 0.5")


def test_a_tensor_that_is_a_part_of_another_is_stored_whole(tmp_path):
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64))
        model.register_buffer("table", torch.randn(8, 4))
        model.register_buffer("head", model.table[:5])
        return model

    model = build()
    sp.sparsify_(model, sp.BlockSparseConfig((16, 16)))
    loaded = sp.load_packed(build(), sp.save_packed(model, tmp_path / "m.safetensors"))
    assert torch.equal(loaded.table, model.table) and torch.equal(loaded.head, model.head)


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    class Counted(nn.Sequential):
        def get_extra_state(self):
            return {"calls": 3}

    model = Counted(nn.Linear(64, 64))
    sp.sparsify_(model, sp.BlockSparseConfig((16, 16)))
    with pytest.raises(
        sp.SparsePruneError, match="_extra_state: expected a tensor, as a safetensors file holds, got dict"
    ):
        sp.save_packed(model, tmp_path / "m.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/run")  # which is not there yet
    (tmp_path / "page").symlink_to("disk/page.html")
    for text in ("first", "second"):
        with serialization.atomic_dir(tmp_path / "out") as temporary:
            (temporary / "f").write_text(text)
        with serialization.atomic_path(tmp_path / "page") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "disk" / "run" / "f").read_text() == (tmp_path / "disk" / "page.html").read_text() == text
        assert (tmp_path / "out").is_symlink() and (tmp_path / "page").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["page.html", "run"]
    with pytest.raises(IsADirectoryError) as told, serialization.atomic_path(tmp_path / "disk"):
        pytest.fail("a directory to write to")
    assert told.value.filename == str(tmp_path / "disk")
