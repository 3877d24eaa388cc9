"""Divergence: KL and first difference against what two small language models give exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sglang_multipole.evaluation import divergence, reference_file
from sglang_multipole.evaluation.client import Client, RequestError
from tests.fake_openai import FakeOpenAI, Reply

VOCABULARY = 8
PROMPT_IDS = [3, 1, 4]


def log_probs(ids: list[int], *, sparse: float) -> list[float]:
    """A language model: any function of the tokens before; `sparse` moves some of it."""
    seed = sum((place + 1) * token for place, token in enumerate(ids))
    scores = [math.sin(1.7 * seed + 2.9 * token) * 2 for token in range(VOCABULARY)]
    scores[seed % VOCABULARY] += sparse
    total = math.log(sum(map(math.exp, scores)))
    return [score - total for score in scores]


def serve(*, sparse: float, first_is_dense: bool = True) -> FakeOpenAI:
    """SGLang's /generate: the first token from prefill, which is dense, others from decode."""

    def reply(path: str, body: dict) -> Reply:
        assert path == "/generate"
        assert body["sampling_params"]["temperature"] == 0
        ids, top, asked = list(body["input_ids"]), [], []
        for step in range(body["sampling_params"]["max_new_tokens"]):
            dense = step == 0 and first_is_dense
            found = log_probs(ids, sparse=0 if dense else sparse)
            ranked = sorted(range(VOCABULARY), key=lambda token: -found[token])
            top.append([[found[t], t, None] for t in ranked[: body.get("top_logprobs_num", 0)]])
            asked.append([[found[t], t, None] for t in body.get("token_ids_logprob", [])])
            ids.append(ranked[0])
        meta = {"output_top_logprobs": top, "output_token_ids_logprobs": asked}
        meta["multipole"] = {"sparse_steps": len(top) - 1 if sparse else 0}
        return 200, {"output_ids": ids[len(body["input_ids"]) :], "meta_info": meta}

    return FakeOpenAI(reply)


def exact_kl(dense: list[float], other: list[float]) -> float:
    return sum(math.exp(p) * (p - q) for p, q in zip(dense, other, strict=True))


def test_a_server_does_not_differ_from_itself() -> None:
    with serve(sparse=0) as fake:
        client = Client(fake.base_url)
        dense = divergence.record(client, PROMPT_IDS, 12)
        measured = divergence.measure(client, dense)
    assert len(dense.output_ids) == len(dense.top) == 12
    assert measured.first_difference is None
    assert measured.kl == pytest.approx([0] * 11, abs=1e-9)
    assert all(measured.agrees)
    assert measured.sparse == [False] * 11
    assert measured.not_forced == 0


def test_kl_is_that_of_the_decode_step_at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(sparse=0) as fake:
        dense = divergence.record(Client(fake.base_url), PROMPT_IDS, 12)
    with serve(sparse=1.5) as fake:
        measured = divergence.measure(Client(fake.base_url), dense)
        assert len(fake.asked) == 1 + 11
    contexts = [PROMPT_IDS + dense.output_ids[:place] for place in range(1, 12)]
    expected = [exact_kl(log_probs(c, sparse=0), log_probs(c, sparse=1.5)) for c in contexts]
    # all tokens are among the top ones here: the bound is the KL
    assert measured.kl == pytest.approx(expected)
    assert max(expected) > 0.1
    gains = [
        log_probs(context, sparse=1.5)[token] - log_probs(context, sparse=0)[token]
        for context, token in zip(contexts, dense.output_ids[1:], strict=True)
    ]
    assert measured.log_prob_gain == pytest.approx(gains)
    assert measured.sparse == [True] * 11
    assert measured.first_difference == measured.agrees.index(False) + 1

    monkeypatch.setattr(divergence, "TOP_TOKENS", 3)
    with serve(sparse=0) as fake:
        fewer = divergence.record(Client(fake.base_url), PROMPT_IDS, 12)
    with serve(sparse=1.5) as fake:
        bounds = divergence.measure(Client(fake.base_url), fewer).kl
    assert all(0 <= low <= high + 1e-9 for low, high in zip(bounds, expected, strict=True))
    assert sum(bounds) < sum(expected)


def test_places_that_cannot_be_forced_are_counted() -> None:
    with serve(sparse=0) as fake:
        dense = divergence.record(Client(fake.base_url), PROMPT_IDS, 12)
    with serve(sparse=4.0, first_is_dense=False) as fake:
        measured = divergence.measure(Client(fake.base_url), dense)
    assert measured.not_forced > 0
    assert len(measured.kl) == 11 - measured.not_forced


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [5], 0), ([], [], None)],
)
def test_the_first_difference_is_found(
    first: list[int], second: list[int], place: int | None
) -> None:
    assert divergence.first_difference(first, second) == place


def test_a_distribution_without_a_rest_has_a_finite_kl() -> None:
    certain = [(1, 0.0)]
    assert divergence.kl_lower_bound(certain, {1: math.log(0.5)}) == pytest.approx(math.log(2))
    assert math.isfinite(divergence.kl_lower_bound([(1, math.log(0.5))], {1: 0.0}))


def test_a_server_without_log_probabilities_is_told() -> None:
    with (
        FakeOpenAI(lambda path, body: (200, {"text": "x"})) as fake,
        pytest.raises(RequestError, match="use an SGLang server"),
    ):
        divergence.record(Client(fake.base_url), PROMPT_IDS, 3)


def test_the_reference_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    answer = divergence.DenseAnswer([1, 2], [3], [[(3, -0.5), (4, -1.5)]])
    reference_file.write(path, [reference_file.ReferenceTask("vt", 100, [answer])])
    (task,) = reference_file.read(path)
    assert (task.task, task.length) == ("vt", 100)
    assert task.answers[0].output_ids == [3]
    assert dict(task.answers[0].top[0]) == {3: -0.5, 4: -1.5}
    path.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="--save-reference"):
        reference_file.read(path)


def test_the_summary_counts_answers_that_failed() -> None:
    one = divergence.Divergence(3, 5, [0.1, 0.3], [True, False], [0.0, -1.0], [True, False], 2)
    same = divergence.Divergence(None, 5, [0.0] * 4, [True] * 4, [0.0] * 4, [True] * 4, 0)
    row = reference_file.summarise(reference_file.ReferenceTask("vt", 100, []), [one, None, same])
    assert row["answers"] == 3
    assert row["failed"] == 1
    assert row["kl"] == pytest.approx(0.1)
    assert row["kl_standard_error"] == pytest.approx(0.1)
    assert row["top1_agreement"] == 0.75
    assert (row["identical"], row["first_difference"]) == (1, 3)
    assert (row["places"], row["sparse_places"], row["not_forced"]) == (6, 5, 2)
