"""The documentation: code in it runs, links in it lead somewhere, and every public name is in the reference."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_prune as sp

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    for target in filter(None, targets):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_is_in_the_reference():
    pytest.importorskip("transformers")
    listed = re.findall(r"^::: (sparse_prune\.[\w.]+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert len(listed) == len(set(listed))
    # Modules that a user imports from have __all__, and docstrings on each.
    modules = [importlib.import_module(name) for name in ("sparse_prune", *_public_modules())]
    assert set(listed) == {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    assert all(getattr(module, name).__doc__ for module in modules for name in module.__all__)


def _public_modules() -> list[str]:
    """Those below sparse_prune that say what is public in them."""
    package = Path(sp.__file__).parent
    files = [file for file in package.rglob("*.py") if file.name != "__init__.py"]
    public = [file.relative_to(package.parent) for file in files if "\n__all__ =" in file.read_text()]
    return [".".join(file.with_suffix("").parts) for file in public]


def test_what_the_pages_import_is_in_the_reference():
    listed = (ROOT / "docs/api.md").read_text()
    for page in PAGES:
        for module, names in re.findall(
            r"^from (sparse_prune[\w.]*) import (.+)$", page.read_text(encoding="utf-8"), re.M
        ):
            for name in names.split(", "):
                assert f"::: {module}.{name}\n" in listed, f"{page.name} imports {name} from {module}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    pages = {page.name for page in ROOT.glob("docs/*.md")}
    assert pages == set(re.findall(r"[\w-]+\.md", navigation))


def test_the_quick_start_code_runs(capsys):
    page = (ROOT / "docs/quick-start.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "docs/quick-start.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip() in page, "the page shows what print(layer) prints"


def _code(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/prune-your-model.md"])
def test_the_loop_in_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = _code(page)
    model = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 64))
    names = {
        "sp": sp,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batches": [torch.randn(2, 64)] * 1000,
        "loss": lambda model, batch: model(batch).square().mean(),
    }
    exec(compile(re.sub(r"^model = \.\.\..*$", "", code, flags=re.M), page, "exec"), names)
    assert "2 of 2 linear layers are sparse, density 0.2" in capsys.readouterr().out
    assert sp.load_packed(model, "model.safetensors") is model


def test_the_code_for_hugging_face_runs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.BertConfig(**sizes, vocab_size=50)
    transformers.BertForSequenceClassification(config).save_pretrained("my-model")
    four_lines, pruned_elsewhere, with_trainer, _ = _code("docs/huggingface.md")
    exec(compile(four_lines, "docs/huggingface.md", "exec"), names := {})
    assert len(names["result"].converted) == 6

    (tmp_path / "my-model-packed").rename("packed-dir")
    (deploy,) = _code("docs/deploy.md")
    exec(compile(deploy, "docs/deploy.md", "exec"), loaded := {})
    text = torch.arange(12).view(2, 6)
    assert torch.equal(loaded["model"](text).logits, names["model"].eval()(text).logits)

    load = transformers.AutoModelForSequenceClassification.from_pretrained
    zeroed = load("my-model")
    zeroed.bert.encoder.layer[0].intermediate.dense.weight.detach()[:32, 32:] = 0
    exec(compile(pruned_elsewhere, "docs/huggingface.md", "exec"), names := {"sp": sp, "model": zeroed})
    assert names["result"].converted == ["bert.encoder.layer.0.intermediate.dense"]

    arguments = {
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    names = {
        "sp": sp,
        "model": load("my-model"),
        "dense": load("my-model"),
        "filter_fn": lambda name, _: "encoder" in name,
        "args": transformers.TrainingArguments(output_dir="out", save_strategy="no", **arguments),
        "data": [{"input_ids": torch.arange(6) + i, "labels": torch.tensor(i % 2)} for i in range(8)],
    }
    exec(compile(with_trainer, "docs/huggingface.md", "exec"), names)
    assert sum(isinstance(module, sp.SparseLinear) for module in names["model"].modules()) == 6


def test_the_code_for_several_processes_runs_on_one_and_resumes(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    code = _code("docs/huggingface.md")[-1].replace("500", "2")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **dropout, vocab_size=50)
    data = [{"input_ids": torch.arange(4) + i, "labels": torch.tensor(i % 2)} for i in range(5)]
    ends = []
    for resume in (False, True):  # the second goes on after the fourth step
        torch.manual_seed(resume)
        model, dense = (transformers.BertForSequenceClassification(config) for _ in range(2))
        names = {
            "sp": sp,
            "model": model,
            "dense": dense,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
            "loader": torch.utils.data.DataLoader(data),
            "filter_fn": lambda name, _: "encoder" in name,
            "resume": resume,
        }
        exec(compile(code, "docs/huggingface.md", "exec"), names)
        assert sum(isinstance(module, sp.SparseLinear) for module in dense.modules()) == 6
        ends.append(names["weights"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
