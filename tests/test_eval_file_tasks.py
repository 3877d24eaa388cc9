"""Tasks from local files: their fields, their prompts and how answers are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_multipole.evaluation.tasks import longbench_v2, registry
from sglang_multipole.evaluation.tasks.aime import final_integer
from sglang_multipole.evaluation.tasks.longbench_v2 import chosen
from sglang_multipole.evaluation.tasks.math_boxed import are_equal
from tests.word_tokenizer import WordTokenizer

ROWS = Path(__file__).parent / "eval_rows"
TOKENIZER = WordTokenizer()


@pytest.mark.parametrize("name", registry.FORMATS)
def test_the_format_is_seen_from_the_fields(name: str) -> None:
    (task,) = registry.make_tasks("file", [], str(ROWS / f"{name}.jsonl"), None)
    assert task.name == name
    prompts = task.generate(10, None, 0, TOKENIZER)
    assert len(prompts) == 3
    assert task.generate(2, None, 0, TOKENIZER) == prompts[:2]


def test_longbench_v2_has_the_question_behind_the_text() -> None:
    task = longbench_v2.LongBenchV2(str(ROWS / "longbench_v2.jsonl"))
    first, second, third = task.generate(3, None, 0, TOKENIZER)
    parts = ["The lighthouse", "</text>", "Why did", "(A) To post", "(B) To fetch", "(D) To sell"]
    places = [first.text.index(part) for part in parts]
    assert places == sorted(places)
    assert [first.reference, second.reference, third.reference] == ["B", "D", "A"]
    assert task.score("The answer is (B)", first.reference) == 1
    assert task.score("The answer is (C)", first.reference) == 0


def test_longbench_v2_cuts_the_middle_of_a_long_document(tmp_path: Path) -> None:
    row = json.loads((ROWS / "longbench_v2.jsonl").read_text().split("\n")[0])
    row["context"] = "Beginning. " + "filler " * 3000 + "The end."
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(row))
    task = longbench_v2.LongBenchV2(str(path))
    (prompt,) = task.generate(1, 500, 0, TOKENIZER)
    assert prompt.shortened
    assert 490 <= len(TOKENIZER.encode(prompt)) <= 500
    assert "Beginning." in prompt.text
    assert longbench_v2.CUT in prompt.text
    assert "The end.\n</text>" in prompt.text
    assert not task.generate(1, 10_000, 0, TOKENIZER)[0].shortened
    with pytest.raises(ValueError, match="give a larger --length"):
        task.generate(1, 20, 0, TOKENIZER)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is (B)", "B"),
        ("A seems right, but **the answer is C**.", "C"),
        ("Answer: D", "D"),
        ("(A)", "A"),
        ("B.", "B"),
        ("The answer is (A). No: the answer is (B).", "B"),
        ("<think>The answer is (A)</think>The answer is (D)", "D"),
        ("The answer is Berlin", None),
        ("A good question", None),
        ("", None),
    ],
)
def test_a_choice_is_read(answer: str, letter: str | None) -> None:
    assert chosen(answer) == letter


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (r"Thus \boxed{14} of 100", 14),
        (r"\boxed{014}", 14),
        (r"$\boxed{n = 7}$", 7),
        ("We add 3 and 4, which is 7.", 7),
        ("none", None),
        (r"<think>\boxed{3}</think>It is \boxed{4}.", 4),
    ],
)
def test_an_integer_is_read(answer: str, number: int | None) -> None:
    assert final_integer(answer) == number


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (r"\frac{3}{2}", r"\dfrac32", True),
        (r"\frac{3}{2}", "1.5", True),
        (r"-\frac{1}{4}", "-0.25", True),
        (r"\frac{-1}{4}", r"-\frac{1}{4}", True),
        ("10{,}001", "10001", True),
        ("10,001", r"10001\text{ cm}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("x = 5", "5", True),
        (r"90^\circ", "90", True),
        (r"50\%", "50", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("(x-1)(x+1)", "(x - 1)(x + 1).", True),
        ("2", "3", False),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("(1,2)", "(2,1)", False),
        ("(1,200)", "(1200)", False),
        ("1/0", "2/0", False),
    ],
)
def test_formulas_are_compared(one: str, other: str, equal: bool) -> None:
    assert are_equal(one, other) is equal


def test_math_takes_the_answer_or_the_box_of_the_solution() -> None:
    (task,) = registry.make_tasks("file", [], str(ROWS / "math.jsonl"), "math")
    prompts = task.generate(3, None, 0, TOKENIZER)
    assert [prompt.reference for prompt in prompts] == [r"\frac{3}{2}", "10{,}001", "(x-1)(x+1)"]
    assert task.score(r"so \boxed{1.5}", prompts[0].reference) == 1
    assert task.score("so 1.5", prompts[0].reference) == 0


@pytest.mark.parametrize(
    ("text", "format_", "message"),
    [
        ("", None, "at least one line"),
        ("no json\n", None, "line 1"),
        ("[1]\n", None, "line 1"),
        ('{"problem": "p"}\n', "aime", "got none of answer in line 1"),
        ('{"problem": "p", "answer": "x^2"}\n', "aime", "integer from 0 to 999"),
        ('{"problem": "p"}\n', "math", "a solution"),
        ('{"problem": "p", "answer": 3}\n', "longbench_v2", "got none of context"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, format_: str | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        registry.make_tasks("file", [], str(path), format_)[0].generate(1, None, 0, TOKENIZER)


def test_a_file_is_required_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --path"):
        registry.make_tasks("file", [], None, None)
    with pytest.raises(ValueError, match="readable JSONL"):
        registry.make_tasks("file", [], str(tmp_path / "absent.jsonl"), None)
