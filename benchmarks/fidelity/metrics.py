"""What a method does to attention, and what it does to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.fidelity.attention_hook import run_model
from benchmarks.fidelity.block import Block, decode_blocks
from benchmarks.fidelity.capture import Capture
from benchmarks.fidelity.index_store import IndexStore
from benchmarks.fidelity.methods.base import Method, paper_bytes


@dataclass(frozen=True)
class AttentionErrors:
    """Per decoded position: error [LH, G, N], |out - dense out| / |dense out|; mass [LH, G, N],
    the part of the true softmax on exactly attended tokens; tokens [LH, N] exact; bytes [N] read
    per head; the sinks and the recent tokens are in neither."""

    error: torch.Tensor
    mass: torch.Tensor
    tokens: torch.Tensor
    bytes: torch.Tensor


@dataclass(frozen=True)
class Divergence:
    """Per decoded position [N]: KL(dense || sparse) of the next token in nats; whether both put
    the same token first; the sparse log-probability of the dense model's first choice, negated."""

    kl: torch.Tensor
    agrees: torch.Tensor
    tokens: torch.Tensor

    @property
    def first(self) -> int:
        """Steps before the sparse model's first choice differs; all of them if it never does.

        On a text that the dense model generated greedily this is where free-running greedy
        decoding would part, because up to there both read the same tokens.
        """
        different = (~self.agrees).nonzero()
        return int(different[0]) if len(different) else len(self.agrees)

    def part(self, begin: int, end: int) -> Divergence:
        """The same of some of the positions; tokens stay those of all."""
        return Divergence(self.kl[begin:end], self.agrees[begin:end], self.tokens)


def block_at(
    capture: Capture, begin: int, end: int, extent: int, heads: slice, stride: int = 1
) -> Block:
    """Every stride-th captured decode position of [begin, end); they see clusters up to extent."""
    offset = begin - capture.prefix_len
    return Block(
        queries=capture.queries[heads, :, offset : offset + end - begin : stride],
        keys=capture.keys[heads, :end],
        values=capture.values[heads, :end],
        positions=torch.arange(begin, end, stride, device=capture.keys.device),
        extent=extent,
        rope=capture.rope,
        sm_scale=capture.sm_scale,
        heads=heads,
        num_kv_heads=capture.num_kv_heads,
    )


@torch.inference_mode()
def attention_errors(
    capture: Capture,
    method: Method,
    exact_tokens: int,
    indexes: IndexStore,
    heads_at_once: int = 15,
    stride: int = 1,
) -> AttentionErrors:
    """The method on captured (dense) queries, keys and values of all layers.

    stride: test every stride-th decode position only.
    """
    num_heads = capture.keys.shape[0]
    columns = []
    for begin, end, extent in decode_blocks(capture.prefix_len, len(capture.token_ids)):
        rows = []
        for first in range(0, num_heads, heads_at_once):
            heads = slice(first, min(first + heads_at_once, num_heads))
            block = block_at(capture, begin, end, extent, heads, stride)
            answer = method.attend(block, indexes, paper_bytes(block, exact_tokens))
            error = (answer.out - block.dense_out).norm(dim=-1) / block.dense_out.norm(dim=-1)
            read = answer.index_bytes + answer.tokens * 4 * block.keys.shape[-1]
            mass = (answer.exact_lse - block.dense_lse).exp()
            rows.append((error, mass, answer.tokens, read.float().mean(0)))
        joined = [torch.cat(part) for part in list(zip(*rows, strict=True))[:3]]
        columns.append((*joined, torch.stack([r[3] for r in rows]).mean(0)))
    return AttentionErrors(*(torch.cat(part, -1) for part in zip(*columns, strict=True)))


@torch.inference_mode()
def teacher_forced(
    model: torch.nn.Module,
    capture: Capture,
    method: Method,
    exact_tokens: int,
    indexes: IndexStore,
    dense_layers: int = 0,
) -> Divergence:
    """Decode the capture's last positions with the method in every layer but the first ones.

    The prefix was prefilled densely. A decoded token's keys and values are those of the sparse
    model, and they are clustered as decoding goes on, block by block, exactly as if the tokens had
    come one by one.
    """
    tokens_read = []

    def attend(layer, queries, new_keys, new_values):
        heads = capture.heads(layer)
        keys = torch.cat([capture.keys[heads, : capture.prefix_len], new_keys], 1)
        values = torch.cat([capture.values[heads, : capture.prefix_len], new_values], 1)
        outs = []
        for begin, end, extent in decode_blocks(capture.prefix_len, len(capture.token_ids)):
            offset = begin - capture.prefix_len
            block = Block(
                queries=queries[:, :, offset : offset + end - begin],
                keys=keys[:, :end],
                values=values[:, :end],
                positions=torch.arange(begin, end, device=keys.device),
                extent=extent,
                rope=capture.rope,
                sm_scale=capture.sm_scale,
                heads=heads,
                num_kv_heads=capture.num_kv_heads,
            )
            if layer < dense_layers:
                outs.append(block.dense_out)
                continue
            answer = method.attend(block, indexes, paper_bytes(block, exact_tokens))
            tokens_read.append(answer.tokens.float().mean())
            outs.append(answer.out)
        return torch.cat(outs, 2)

    decoded = capture.token_ids[capture.prefix_len :]
    log_probs = run_model(model, decoded, capture.prefix_len, attend, len(decoded))
    kl, agrees = [], []
    # in parts, for the sake of memory: vocabularies are large
    pairs = zip(capture.log_probs.split(512), log_probs.split(512), strict=True)
    for dense, sparse in pairs:
        kl.append((dense.exp() * (dense - sparse)).sum(-1))
        agrees.append(dense.argmax(-1) == sparse.argmax(-1))
    return Divergence(torch.cat(kl), torch.cat(agrees), torch.stack(tokens_read).mean())
