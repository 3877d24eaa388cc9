"""Which tasks there are, by the names that --task takes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sglang_multipole.evaluation.task import Task
from sglang_multipole.evaluation.tasks.aime import Aime
from sglang_multipole.evaluation.tasks.fwe import FrequentWords
from sglang_multipole.evaluation.tasks.gsm_symbolic import GsmSymbolic
from sglang_multipole.evaluation.tasks.longbench_v2 import LongBenchV2
from sglang_multipole.evaluation.tasks.math_boxed import MathBoxed
from sglang_multipole.evaluation.tasks.niah_multikey_2 import NiahMultikey2
from sglang_multipole.evaluation.tasks.niah_multikey_3 import NiahMultikey3
from sglang_multipole.evaluation.tasks.niah_single import NiahSingle
from sglang_multipole.evaluation.tasks.passkey import Passkey
from sglang_multipole.evaluation.tasks.rows import read_rows
from sglang_multipole.evaluation.tasks.vt import VariableTracking

RETRIEVAL = (
    NiahSingle,
    NiahMultikey2,
    NiahMultikey3,
    VariableTracking,
    FrequentWords,
    Passkey,
)
FORMATS = {"longbench_v2": LongBenchV2, "aime": Aime, "math": MathBoxed}
GSM = "gsm_symbolic"
FILE = "file"
NAMES = (*(task.name for task in RETRIEVAL), GSM, FILE)


def make_tasks(name: str, ops: Sequence[int], path: str | None, format_: str | None) -> list[Task]:
    """The tasks of one name: one for each of `ops` if it is gsm_symbolic.

    Raises:
        ValueError: --path or --ops is missing or wrong.
    """
    if name == GSM:
        return [GsmSymbolic(number) for number in ops]
    if name == FILE:
        if not path:
            raise ValueError("task file: a JSONL file is required, got none; give --path X.jsonl")
        return [FORMATS[format_ or guess_format(path)](path)]
    return [next(task for task in RETRIEVAL if task.name == name)()]


def guess_format(path: str) -> str:
    """Rows with choice_A are multiple choice; if all answers are integers below 1000, AIME."""
    rows = read_rows(path, ())
    if all("choice_A" in row for row in rows):
        return "longbench_v2"
    if all(_is_aime(row.get("answer")) for row in rows):
        return "aime"
    return "math"


def _is_aime(answer: object) -> bool:
    return re.fullmatch(r"\d{1,3}", str(answer).strip()) is not None
