"""Fit what a method needs to know beforehand, on a text of the dev split."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.fidelity.capture import Capture
from benchmarks.fidelity.index_store import IndexStore
from benchmarks.fidelity.methods.multipole import Multipole
from benchmarks.fidelity.metrics import attention_errors

CAP_FACTOR = 4.0


def fit_adaptive(
    capture: Capture, method: Multipole, exact_tokens: int, stride: int = 16
) -> tuple[Multipole, Multipole]:
    """The method with an adaptive budget of the same mean as its fixed one on this text.

    Returns:
        One that takes every cluster ranked above a threshold, up to CAP_FACTOR budgets; one with
        a fixed budget per layer, the mean of what the first took there.
    """
    indexes = IndexStore(capture, len(capture.token_ids))
    heads_at_once = len(capture.keys) if capture.keys.is_cuda else 15

    def tokens_by_layer(candidate: Multipole) -> torch.Tensor:
        errors = attention_errors(capture, candidate, exact_tokens, indexes, heads_at_once, stride)
        return errors.tokens.float().unflatten(0, (-1, capture.num_kv_heads)).mean((1, 2))

    fixed = tokens_by_layer(method).mean()
    low, high = -14.0, 0.0  # log of the threshold
    for _ in range(10):
        middle = (low + high) / 2
        choices = replace(
            method.choices, rule="threshold", threshold=2.718**middle, cap_factor=CAP_FACTOR
        )
        candidate = Multipole(f"{method.name}-threshold", choices, method.clusterer.calibration)
        by_layer = tokens_by_layer(candidate)
        low, high = (middle, high) if by_layer.mean() > fixed else (low, middle)
    weights = (by_layer / by_layer.mean()).clamp(0.25, CAP_FACTOR)
    choices = replace(method.choices, layer_weights=tuple((weights / weights.mean()).tolist()))
    return candidate, Multipole(f"{method.name}-layers", choices, method.clusterer.calibration)
