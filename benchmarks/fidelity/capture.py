"""One dense run over a text: its queries, keys and values in every layer, and its predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.fidelity.attention_hook import run_model
from benchmarks.fidelity.rope import RopeTable

MIN_ROPE_POSITIONS = 4096


@dataclass(frozen=True)
class Capture:
    """What the dense model saw. Heads of all layers lie in one row: LH = layers * KV heads.

    queries [LH, G, N, D] of the last N positions; keys, values [LH, T, D] of all positions, with
    RoPE; log_probs [N, vocabulary] of the token after each of the last N.
    """

    token_ids: torch.Tensor
    num_decoded: int
    num_kv_heads: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor
    rope: RopeTable
    sm_scale: float

    @property
    def prefix_len(self) -> int:
        """Tokens before the first decoded position."""
        return len(self.token_ids) - self.num_decoded

    def heads(self, layer: int) -> slice:
        """The layer's part of the row of heads."""
        return slice(layer * self.num_kv_heads, (layer + 1) * self.num_kv_heads)


def dense_causal(queries, keys, values, sm_scale: float) -> torch.Tensor:
    """Causal attention of queries [H, G, N, D] to keys, values [H, N, D]."""
    out = F.scaled_dot_product_attention(
        queries.flatten(0, 1)[None],
        keys[None].repeat_interleave(queries.shape[1], 1),
        values[None].repeat_interleave(queries.shape[1], 1),
        is_causal=True,
        scale=sm_scale,
    )
    return out[0].view(queries.shape)


def capture(model: torch.nn.Module, token_ids: list[int], num_decoded: int) -> Capture:
    """Run the text densely; the last num_decoded positions are those to be decoded sparsely."""
    tokens = torch.tensor(token_ids, device=model.device)
    sm_scale = model.get_decoder().layers[0].self_attn.scaling
    queries, keys, values = [], [], []

    def attend(_, q, k, v):
        queries.append(q[:, :, -num_decoded:].clone())
        keys.append(k)
        values.append(v)
        return dense_causal(q, k, v, sm_scale)

    log_probs = run_model(model, tokens, 0, attend, num_decoded)
    return Capture(
        token_ids=tokens,
        num_decoded=num_decoded,
        num_kv_heads=keys[0].shape[0],
        queries=torch.cat(queries),
        keys=torch.cat(keys),
        values=torch.cat(values),
        log_probs=log_probs,
        # methods may compare at positions beyond a short text
        rope=RopeTable.of_model(model, max(len(tokens), MIN_ROPE_POSITIONS)),
        sm_scale=sm_scale,
    )
