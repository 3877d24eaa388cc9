"""The examples: what they compute on their own; they run against servers in `make demo`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo")


@pytest.mark.parametrize(
    ("first", "second", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [5], 0), ([], [], None)],
)
def test_the_first_difference_is_found(
    demo: ModuleType, first: list[int], second: list[int], position: int | None
) -> None:
    assert demo.find_difference(first, second) == position


def test_absent_counters_are_said_and_present_ones_are_all_shown(demo: ModuleType) -> None:
    describe = demo.best_of_n.describe_activity
    assert "no multipole counters" in describe(None)
    counters = {key: i for i, key in enumerate(demo.best_of_n.ACTIVITY_KEYS)}
    assert all(f"{key} {i}" in describe(counters) for key, i in counters.items())


@pytest.mark.server
def test_the_shared_prompt_is_long(demo: ModuleType, model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    assert len(tokenizer(demo.best_of_n.build_prompt()).input_ids) >= 4000
