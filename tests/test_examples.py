"""The examples run and show activity."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


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
