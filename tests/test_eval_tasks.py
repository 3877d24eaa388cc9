"""The tasks that are generated: their rules hold in every prompt, and answers are read rightly."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from sglang_multipole.evaluation import noise
from sglang_multipole.evaluation.task import Prompt, Task, fit, last_boxed, strip_reasoning
from sglang_multipole.evaluation.tasks import fwe
from sglang_multipole.evaluation.tasks.gsm_symbolic import GsmSymbolic, concluded_names
from sglang_multipole.evaluation.tasks.registry import make_tasks
from tests.word_tokenizer import WordTokenizer

RETRIEVAL = ("niah_single", "niah_multikey_2", "niah_multikey_3", "vt", "fwe", "passkey")
LENGTH = 3000
SEED = 7
TOKENIZER = WordTokenizer()
NEEDLE = re.compile(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def make(name: str) -> Task:
    return make_tasks(name, [4], None, None)[0]


def prompts_of(name: str, samples: int = 3, length: int = LENGTH, seed: int = SEED) -> list[Prompt]:
    return make(name).generate(samples, length, seed, TOKENIZER)


def asked_key(prompt: Prompt) -> str:
    return re.search(r"What is the special magic \w+ for (\S+) mentioned", prompt.text)[1]


@pytest.mark.parametrize("name", [*RETRIEVAL, "gsm_symbolic"])
def test_the_same_seed_gives_the_same_prompts_and_another_gives_others(name: str) -> None:
    first = prompts_of(name)
    assert first == prompts_of(name)
    assert len({prompt.text for prompt in first}) == 3
    # more samples begin with the fewer
    assert prompts_of(name, 2) == first[:2]
    assert not {p.text for p in first} & {p.text for p in prompts_of(name, seed=SEED + 1)}


@pytest.mark.parametrize("name", [*RETRIEVAL, "gsm_symbolic"])
@pytest.mark.parametrize("length", [1600, 5000])
def test_a_prompt_with_its_answer_fills_the_length_but_for_a_line(name: str, length: int) -> None:
    # gsm_symbolic: reasoning has no length that could be kept free
    reserved = 0 if name == "gsm_symbolic" else make(name).max_tokens
    for prompt in prompts_of(name, length=length):
        tokens = len(TOKENIZER.encode(prompt)) + reserved
        assert length - 75 <= tokens <= length


@pytest.mark.parametrize("name", [*RETRIEVAL, "gsm_symbolic"])
def test_a_length_without_room_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*--length"):
        prompts_of(name, length=60)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_a_length_is_required(name: str) -> None:
    with pytest.raises(ValueError, match="give --length"):
        make(name).generate(1, None, SEED, TOKENIZER)


def test_niah_single_hides_one_number_in_filler() -> None:
    for prompt in prompts_of("niah_single"):
        ((kind, key, value),) = NEEDLE.findall(prompt.text)
        assert kind == "number"
        assert re.fullmatch(r"[1-9]\d{6}", value)
        assert prompt.reference == [value]
        assert key == asked_key(prompt)
        assert key in prompt.answer_prefix
        assert prompt.text.count(value) == 1
        assert value not in prompt.answer_prefix
        assert noise.LINE in prompt.text


@pytest.mark.parametrize(
    ("name", "kind", "key_form", "value_form"),
    [
        ("niah_multikey_2", "number", r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_3", "uuid", UUID.pattern, UUID.pattern),
    ],
)
def test_multikey_haystacks_are_needles_with_other_keys_and_values(
    name: str, kind: str, key_form: str, value_form: str
) -> None:
    places = []
    for prompt in prompts_of(name, 8):
        found = NEEDLE.findall(prompt.text)
        keys, values = [key for _, key, _ in found], [value for _, _, value in found]
        assert len(found) >= 20
        assert {one for one, _, _ in found} == {kind}
        assert len(set(keys)) == len(set(values)) == len(found)
        assert all(re.fullmatch(key_form, key) for key in keys)
        assert all(re.fullmatch(value_form, value) for value in values)
        place = keys.index(asked_key(prompt))
        assert prompt.reference == [values[place]]
        places.append(place / (len(found) - 1))
    # needles lie everywhere
    assert min(places) < 0.4
    assert max(places) > 0.6


def test_vt_is_one_chain_in_order_behind_a_solved_example() -> None:
    for prompt in prompts_of("vt"):
        lines = prompt.text.split("\n")
        assigned = [line.strip() for line in lines if re.match(r"VAR [A-Z]{5} =", line)]
        names = [line.split()[1] for line in assigned]
        value = re.fullmatch(r"VAR \w+ = ([1-9]\d{4})", assigned[0])[1]
        assert assigned[1:] == [
            f"VAR {later} = VAR {earlier}" for earlier, later in zip(names, names[1:], strict=False)
        ]
        assert len(set(names)) == 5
        assert prompt.reference == names
        question = prompt.text.split("Question:")[-1]
        assert value in question
        assert not any(name in question + prompt.answer_prefix for name in names)
        # the example has another value and shorter names, and is answered
        example, _, _ = prompt.text.rpartition("Memorize and track")
        assert len(re.findall(r"^VAR [A-Z]{3} =", example, flags=re.MULTILINE)) == 5
        assert len(re.search(r"assigned the value \d{5} are:((?: [A-Z]{3})+)\n", example)[1]) == 20
        assert len(TOKENIZER.encode(Prompt(example, None))) <= 500 + 30


def test_fwe_asks_for_the_three_most_frequent_words() -> None:
    for prompt in prompts_of("fwe"):
        text = prompt.text.split("\n")[1]
        counts = Counter(word for word in text.split() if word != fwe.DOTS)
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts)
        ranked = counts.most_common(4)
        assert [word for word, _ in ranked[:3]] == prompt.reference
        # without ties, and fewer than the dots
        assert len({count for _, count in ranked}) == 4
        assert text.split().count(fwe.DOTS) > ranked[0][1]
        assert len(counts) == (LENGTH - 50) // 50 - 1


@pytest.mark.parametrize("size", [0, 10, 1000, 10**6])
def test_fwe_counts_follow_the_zeta_law_without_ties(size: int) -> None:
    counts = fwe.count_words(60, size)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts[:5])) == 5
    assert counts[-1] >= 1
    if size >= 1000:
        assert counts[0] / counts[1] == pytest.approx(4, rel=0.05)


def test_passkey_stands_on_one_line() -> None:
    for prompt in prompts_of("passkey"):
        (line,) = [line for line in prompt.text.split("\n") if re.search(r"\d", line)]
        assert re.findall(r"\d+", line) == [prompt.reference] * 2
        assert len(prompt.reference) == 5


def read_relations(prompt: Prompt) -> dict[str, tuple[str, int]]:
    """What each variable is defined by: a parent or "" and what is added to it."""
    context = re.search(r"<context>\n(.*)\n</context>", prompt.text)[1]
    relations = {}
    for line in context.removesuffix(".").split(". "):
        match = re.fullmatch(r"assign (V\d{6}) = (?:(\d+)|(V\d{6})(?: ([+-]) 1)?)", line)
        name, value, parent, sign = match.groups()
        assert name not in relations
        added = int(value) if value else {"+": 1, "-": -1, None: 0}[sign]
        relations[name] = (parent or "", added)
    return relations


@pytest.mark.parametrize("ops", range(1, 9))
def test_gsm_symbolic_can_be_solved_and_its_filler_cannot(ops: int) -> None:
    for prompt in GsmSymbolic(ops).generate(3, 1500, SEED, TOKENIZER):
        relations = read_relations(prompt)
        values: dict[str, int] = {"": 0}
        while new := {
            name: values[parent] + added
            for name, (parent, added) in relations.items()
            if parent in values and name not in values
        }:
            values |= new
        del values[""]
        asked = int(re.search(r"are equal to (-?\d+)\.", prompt.text)[1])
        assert len(values) == ops
        assert len(relations) > 20 + ops
        assert sum(parent == "" for parent, _ in relations.values()) == 1
        # children before and after their parents
        assert sorted(prompt.reference) == sorted(n for n, v in values.items() if v == asked)
        assert prompt.reference


def test_gsm_symbolic_without_a_length_has_no_filler() -> None:
    (prompt,) = GsmSymbolic(6).generate(1, None, SEED, TOKENIZER)
    assert len(read_relations(prompt)) == 6


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("V000001 = 3. V000002 = 4.\n\nThe variables equal to 3 are V000001 and V000003.", "13"),
        ("So far V000009.\nTherefore:\n- V000001\n- V000003\n", "13"),
        ("V000009 is 2.\n1. V000001\n2) V000003\n\nThat is all.", "13"),
        ("V000002 was wrong. Thus **V000001**, **V000003** are equal to 3. I am sure.", "13"),
        (r"V000002, then $\boxed{V_{000001}, \text{V000003}}$ where V000009 is not.", "13"),
        ("<think>V000001 and V000003</think>The only one is V000004.", "4"),
        ("<think>V000001 and V000003 are", ""),
        ("There are none.", ""),
        ("", ""),
    ],
)
def test_gsm_symbolic_reads_the_conclusion(answer: str, names: str) -> None:
    assert concluded_names(answer) == {f"V00000{digit}" for digit in names}


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("niah_single", "It is 1234567.", ["1234567"], 1.0),
        ("niah_single", "It is 1234568.", ["1234567"], 0.0),
        ("vt", "abcde ABCDF", ["ABCDE", "ABCDF", "XXXXX", "YYYYY", "ZZZZZ"], 0.4),
        ("fwe", "<think>aaaaaa</think> 1. bbbbbb", ["aaaaaa", "bbbbbb", "cccccc"], 1 / 3),
        ("passkey", "the key is 12345.", "12345", 1.0),
        ("passkey", "the key is 123456.", "12345", 0.0),
        ("gsm_symbolic", "It is V000001.", ["V000001"], 1.0),
        ("gsm_symbolic", "They are V000001 and V000002.", ["V000001"], 0.0),
    ],
)
def test_scores_follow_the_rule_of_the_task(
    name: str, answer: str, reference: Any, score: float
) -> None:
    assert make(name).score(answer, reference) == pytest.approx(score)


def test_the_largest_haystack_that_fits_is_found() -> None:
    for length in (1, 15, 16, 17, 31, 32, 33, 1000):
        prompt = fit(lambda size: Prompt("a " * size, None), length, TOKENIZER, "test")
        assert prompt.text == "a " * (length // 2)


@pytest.mark.parametrize(
    ("answer", "final"),
    [("a</think>b", "b"), ("<think>a", ""), ("a", "a"), ("</think>a</think>b", "b")],
)
def test_thinking_is_no_answer(answer: str, final: str) -> None:
    assert strip_reasoning(answer) == final


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("none", None),
    ],
)
def test_the_last_box_is_read_with_its_braces(answer: str, content: str | None) -> None:
    assert last_boxed(answer) == content
