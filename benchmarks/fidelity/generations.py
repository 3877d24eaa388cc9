"""Sample long continuations from the model itself: the text that long reasoning is made of.

    python -m benchmarks.fidelity.generations MODEL OUT.json --tokens 8192

All prompts are decoded side by side with a key-value buffer of fixed size. The end-of-turn tokens
are forbidden, so every text reaches its length. The result is a JSON list of {name, token_ids}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.fidelity.checkpoint import load_model, tokenizer_arguments

PROMPTS = {
    "dev-tutorial": "Write a very long and detailed tutorial on how to build a wooden boat, with "
    "a list of materials, all the steps, their reasons, and the mistakes to avoid.",
    "test-story": "Write a long story in many chapters about a lighthouse keeper, her brother and "
    "a ship that comes back after forty years. Give every person a name and a past.",
    "test-proofs": "Solve these one after the other, thinking step by step, checking each result "
    "and trying a second way: 1) the sum of the first n odd numbers, 2) the number of diagonals "
    "of a polygon, 3) the area of a circle's segment, 4) how many primes there are below 200.",
}

# tokens of a prompt that go through the model at once
PROMPT_CHUNK = 512


class DecodeBuffer:
    """Keys and values of all layers [num_layers, batch, num_kv_heads, max_len, head_dim]."""

    def __init__(self, model: torch.nn.Module, batch: int, max_len: int) -> None:
        config = model.config
        # not every configuration names it
        head_dim = model.get_decoder().layers[0].self_attn.head_dim
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_len)
        self.keys = torch.zeros(*shape, head_dim, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def attend(self, module, query, key, value, attention_mask, scaling, **_):
        """Causal attention of new tokens [batch, num_q_heads, new, head_dim] to all so far."""
        layer, new = module.layer_idx, key.shape[2]
        end = self.length + new
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        batch, num_q_heads, _, head_dim = query.shape
        grouped = query.reshape(batch, keys.shape[1], -1, head_dim)  # [batch, kv, group * new, D]
        scores = grouped @ keys.mT * scaling
        if new > 1:
            causal = torch.ones(new, end, dtype=torch.bool, device=query.device).tril(end - new)
            scores = scores.view(batch, num_q_heads, new, end).masked_fill(~causal, float("-inf"))
            scores = scores.view(*grouped.shape[:3], end)
        out = scores.softmax(-1) @ values
        return out.view(batch, num_q_heads, new, head_dim).transpose(1, 2), None


def _forward(model, buffer: DecodeBuffer, new: torch.Tensor) -> torch.Tensor:
    """[batch, vocabulary] float32 logits after the new tokens [batch, n]."""
    positions = torch.arange(buffer.length, buffer.length + new.shape[1], device=model.device)
    out = model(new, position_ids=positions.expand_as(new), use_cache=False, logits_to_keep=1)
    buffer.length += new.shape[1]
    return out.logits[:, -1].float()


@torch.inference_mode()
def sample(
    model,
    prompts: list[torch.Tensor],
    num_tokens: int,
    forbidden: list[int],
    seed: int,
    temperature: float = 0.9,
    top_p: float = 0.95,
    on_progress=None,
) -> torch.Tensor:
    """[num_prompts, num_tokens] token ids; prompts are cut at the front to one length."""
    length = min(len(p) for p in prompts)
    tokens = torch.stack([p[-length:] for p in prompts]).to(model.device)
    buffer = DecodeBuffer(model, len(prompts), num_tokens)
    ALL_ATTENTION_FUNCTIONS.register("fidelity_generation", buffer.attend)
    model.set_attn_implementation("fidelity_generation")
    generator = torch.Generator(model.device).manual_seed(seed)
    *chunks, new = tokens.split(PROMPT_CHUNK, 1)
    for chunk in chunks:
        _forward(model, buffer, chunk)
    while tokens.shape[1] < num_tokens:
        out = _forward(model, buffer, new)
        out[:, forbidden] = float("-inf")
        if temperature == 0:
            new = out.argmax(-1, keepdim=True)
        else:
            probability, ids = (out / temperature).softmax(-1).sort(-1, descending=True)
            probability[probability.cumsum(-1) - probability > top_p] = 0
            new = ids.gather(-1, torch.multinomial(probability, 1, generator=generator))
        tokens = torch.cat([tokens, new], 1)
        if on_progress and tokens.shape[1] % 512 == 0:
            on_progress(tokens)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = load_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
    prompts = [
        tokenizer(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n").input_ids
        for p in PROMPTS.values()
    ]
    forbidden = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]

    def save(tokens: torch.Tensor) -> None:
        rows = zip(PROMPTS, tokens.tolist(), strict=True)
        args.out.write_text(json.dumps([{"name": n, "token_ids": ids} for n, ids in rows]))
        print(f"{tokens.shape[1]} tokens", flush=True)

    tensors = [torch.tensor(p) for p in prompts]
    save(sample(model, tensors, args.tokens, forbidden, args.seed, on_progress=save))


if __name__ == "__main__":
    main()
