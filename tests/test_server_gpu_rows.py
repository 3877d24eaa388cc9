"""The script that runs server tests writes a row for each, also for one that fails."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

TESTS = """
def test_equal(record_property):
    record_property("equal", 7)
    record_property("answers", 8)

def test_other():
    assert 1 == 2
"""


def test_each_test_has_a_row(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.server_gpu_tests", f"--csv={path}"]
    command += ["--commit=abc", str(tmp_path / "test_some.py")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["test"], row["result"], row["commit"]) for row in rows] == [
        ("test_equal", "passed", "abc"),
        ("test_other", "failed", "abc"),
    ]
    assert [row["answers_equal_to_the_last_token"] for row in rows] == ["7", ""]
