"""The server tests on GPUs, with a row of a CSV for each, written as soon as it has ended.

    python -m benchmarks.server_gpu_tests --csv out.csv tests/test_gpu_server.py -k weights

All other arguments are pytest's. Where a test compares greedy answers, the row says how many were
equal to the last token; the others parted at a tie, or the test would have failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.csv_file import write_rows
from benchmarks.versions import versions
from tests.server_fixture import MODEL_VARIABLE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--commit", default="", help="where there is no git repository")
    arguments, of_pytest = parser.parse_known_args()
    return pytest.main(of_pytest, [TestRows(arguments.csv, versions(arguments.commit))])


class TestRows:
    """A pytest plugin: the rows of the tests that have run.

    Args:
        csv: where they are written.
        common: columns of every row.
    """

    __test__ = False  # not a test, whatever its name

    def __init__(self, csv: Path, common: dict[str, Any]):
        self._csv, self._common = csv, common
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        properties = dict(report.user_properties)
        self.rows.append(
            {
                "test": report.nodeid.partition("::")[2],
                "model": Path(os.environ.get(MODEL_VARIABLE, "SmolLM2-135M-Instruct")).name,
                "gpus": torch.cuda.device_count(),
                "answers_equal_to_the_last_token": properties.get("equal", ""),
                "answers": properties.get("answers", ""),
                "result": report.outcome,
                "seconds": round(report.duration, 1),
                **self._common,
            }
        )
        write_rows(self._csv, self.rows)


if __name__ == "__main__":
    sys.exit(main())
