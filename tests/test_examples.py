"""The examples: what they compute on their own; they run against servers in `make demo`."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
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
    describe = demo.activity.describe
    assert "no multipole counters" in describe(None)
    counters = {key: i for i, key in enumerate(demo.activity.KEYS)}
    assert all(f"{key} {i}" in describe(counters) for key, i in counters.items())


@pytest.mark.server
def test_the_shared_prompt_is_long(demo: ModuleType, model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    assert len(tokenizer(demo.best_of_n.build_prompt()).input_ids) >= 4000


@pytest.mark.server
def test_the_engine_example_answers_sparsely_and_shares_its_document(model_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "offline_batch.py")),
            *("--model-path", str(model_path), "--max-new-tokens", "8"),
        ],
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    activities = [
        ast.literal_eval(line.strip()) for line in done.stdout.splitlines() if "{" in line
    ]
    assert len(activities) == 3
    assert all(a["sparse_steps"] > 0 and a["dense_steps"] == 0 for a in activities)
    assert activities[0]["segments_built"] >= 1
    assert activities[1]["segments_shared"] == activities[0]["segments_built"]
    assert activities[1]["segments_built"] == 0
