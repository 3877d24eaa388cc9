"""Run a transformers model with an attention function of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# (layer, queries [H, G, N, D], keys [H, N, D], values [H, N, D]) -> out [H, G, N, D]
LayerAttention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_NAME = "fidelity"


@contextmanager
def layer_attention(model: torch.nn.Module, attend: LayerAttention) -> Iterator[None]:
    """Inside, every layer of the model calls attend, for a batch of one and without a cache.

    The function masks what a query must not see; the model passes no mask.
    """

    def call(module, query, key, value, attention_mask, **_):
        num_kv_heads = key.shape[1]
        queries = query[0].view(num_kv_heads, -1, *query.shape[2:])
        out = attend(module.layer_idx, queries, key[0], value[0])
        return out.reshape(query.shape).transpose(1, 2), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_NAME, call)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def run_model(
    model: torch.nn.Module,
    token_ids: torch.Tensor,
    first_position: int,
    attend: LayerAttention,
    num_logits: int,
) -> torch.Tensor:
    """[num_logits, vocabulary] float32 log-probabilities after the last num_logits tokens.

    token_ids [N] lie at positions first_position and on.
    """
    end = first_position + len(token_ids)
    positions = torch.arange(first_position, end, device=model.device)[None]
    with layer_attention(model, attend):
        out = model(
            token_ids[None], position_ids=positions, use_cache=False, logits_to_keep=num_logits
        )
    return out.logits[0].float().log_softmax(-1)
