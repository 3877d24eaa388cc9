"""The documentation's generated tables are those of the code, and its links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from sglang_multipole import refusals
from sglang_multipole.config import MultipoleConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["arguments.md", "support.md"])
def test_generated_tables_are_not_stale(generate: ModuleType, name: str) -> None:
    text = (DOCS / name).read_text()
    assert "<!-- generated: " in text
    assert generate.render(text) == text, "run `python docs/generate.py`"


def test_a_stale_table_is_seen(generate: ModuleType) -> None:
    text = (DOCS / "arguments.md").read_text()
    assert generate.render(text.replace("`token_budget`", "`budget`")) == text


def test_every_key_and_every_refusal_is_documented() -> None:
    arguments, support = ((DOCS / name).read_text() for name in ("arguments.md", "support.md"))
    for field in dataclasses.fields(MultipoleConfig):
        assert f"| `{field.name}` |" in arguments
    for rule in (*refusals.ARGUMENTS, *refusals.MODELS):
        assert f"| {rule.feature} | {rule.recipe} |" in support


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, target
