"""The documentation: code in it runs, links in it lead somewhere, and every public name is in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sparse_prune as sp

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    for target in filter(None, targets):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^::: sparse_prune\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M))
    assert listed == set(sp.__all__)


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
