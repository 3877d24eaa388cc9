"""How far a server's decoding is from a dense server's, where neither need solve the task.

The dense server answers greedily, and its most likely tokens at each place are kept. Then, against
the server under test:

free run: it answers greedily too; the first token that differs is the divergence.

forced: its distribution at every place of the dense answer. A prompt that ends with the dense
answer would be prefilled, and prefill is dense. So the prompt ends one token before, and two tokens
are generated: the first comes from that dense prefill and is the dense answer's own token, the
second from a decode step, which is the one under test. Where the first token is another (a near
tie), the place is left out and counted.

KL is over the dense server's TOP_TOKENS most likely tokens and one class for all others: a lower
bound of the KL over the vocabulary. The first token of an answer comes from prefill and is not
measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from sglang_multipole.evaluation.client import Client, RequestError

TOP_TOKENS = 50
# of a class whose probability is lost in rounding
MIN_PROBABILITY = 1e-9


@dataclasses.dataclass(frozen=True)
class DenseAnswer:
    """One greedy answer of the dense server.

    Attributes:
        prompt_ids: tokens of the prompt.
        output_ids: tokens of the answer.
        top: for each token of the answer, the most likely ids and their log-probabilities.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    top: list[list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How one answer differs; lists have an entry for each place that was forced.

    Attributes:
        first_difference: place of the first token of the free run that differs; None if none does.
        num_tokens: of the dense answer.
        kl: lower bounds of the KL from the dense distribution, nats.
        agrees: whether the most likely of the dense server's top tokens is the same.
        log_prob_gain: log-probability of the dense answer's token here, less the dense server's.
        sparse: whether the step was sparse; None if the server does not tell.
        not_forced: places left out, since the token before could not be forced.
    """

    first_difference: int | None
    num_tokens: int
    kl: list[float]
    agrees: list[bool]
    log_prob_gain: list[float]
    sparse: list[bool | None]
    not_forced: int


def record(client: Client, prompt_ids: list[int], max_tokens: int) -> DenseAnswer:
    """Ask a dense SGLang server for its greedy answer.

    Raises:
        RequestError: the request failed, or the server has no /generate with log-probabilities.
    """
    answered = _generate(client, prompt_ids, max_tokens, {"top_logprobs_num": TOP_TOKENS})
    try:
        output_ids = answered["output_ids"]
        top = [
            [(int(token), float(log_prob)) for log_prob, token, *_ in place]
            for place in answered["meta_info"]["output_top_logprobs"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_log_probs(client, error) from error
    return DenseAnswer(prompt_ids, output_ids, top[: len(output_ids)])


def measure(client: Client, dense: DenseAnswer) -> Divergence:
    """Run freely, then force every place of the dense answer, in order.

    Raises:
        RequestError: see record.
    """
    free = _generate(client, dense.prompt_ids, len(dense.output_ids))["output_ids"]
    kl, agrees, gain, sparse = [], [], [], []
    not_forced = 0
    for place in range(1, len(dense.output_ids)):
        expected = dense.top[place]
        forced = dense.prompt_ids + dense.output_ids[: place - 1]
        ids = {"token_ids_logprob": [token for token, _ in expected]}
        answered = _generate(client, forced, 2, ids, ignore_eos=True)
        first, *others = answered["output_ids"]
        if first != dense.output_ids[place - 1]:
            not_forced += 1
            continue
        try:
            (token_here,) = others
            measured = {
                int(token): float(log_prob)
                for log_prob, token, *_ in answered["meta_info"]["output_token_ids_logprobs"][1]
            }
            kl.append(kl_lower_bound(expected, measured))
            gained = measured[dense.output_ids[place]] - dict(expected)[dense.output_ids[place]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _no_log_probs(client, error) from error
        most_likely = max(expected, key=lambda pair: pair[1])[0]
        agrees.append(token_here == most_likely)
        gain.append(gained)
        activity = answered["meta_info"].get("multipole")
        sparse.append(None if activity is None else activity["sparse_steps"] == 1)
    return Divergence(
        first_difference(dense.output_ids, free),
        len(dense.output_ids),
        kl,
        agrees,
        gain,
        sparse,
        not_forced,
    )


def kl_lower_bound(expected: Sequence[tuple[int, float]], measured: dict[int, float]) -> float:
    """KL of two distributions known on the same few tokens, all others taken as one class."""
    total, expected_rest, measured_rest = 0.0, 1.0, 1.0
    for token, log_p in expected:
        p = math.exp(log_p)
        total += p * (log_p - measured[token])
        expected_rest -= p
        measured_rest -= math.exp(measured[token])
    if expected_rest > MIN_PROBABILITY:
        total += expected_rest * math.log(expected_rest / max(measured_rest, MIN_PROBABILITY))
    return max(total, 0.0)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first place where two answers differ, or where one ends; None if they are equal."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return None if len(first) == len(second) else min(len(first), len(second))


def _generate(
    client: Client,
    input_ids: list[int],
    max_tokens: int,
    logprob: dict[str, Any] | None = None,
    *,
    ignore_eos: bool = False,
) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": ignore_eos}
    body: dict[str, Any] = {"input_ids": input_ids, "sampling_params": sampling}
    if logprob is not None:
        body.update(logprob, return_logprob=True)
    answered = client.post("/generate", body)
    if not isinstance(answered, dict) or not answered.get("output_ids"):
        raise _no_log_probs(client, "no output_ids")
    return answered


def _no_log_probs(client: Client, reason: object) -> RequestError:
    return RequestError(
        f"eval: a reference needs SGLang's /generate with log-probabilities, got {reason!r} from "
        f"{client.root}; use an SGLang server",
        retry=False,
    )
