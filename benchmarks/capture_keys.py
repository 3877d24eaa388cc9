"""Capture a model's keys, values and queries of one text: inputs of benchmarks.decode_attention.

    python -m benchmarks.capture_keys MODEL keys.pt [--tokens 8192] [--layers 4,12,20,27]

The text is Newton's Opticks. Kept are heads of the named layers with RoPE, in float16, and the
queries of the last positions; 17 MB for the defaults and a model of head_dim 64.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer

from benchmarks.fidelity.capture import capture
from benchmarks.fidelity.checkpoint import load_model, tokenizer_arguments
from benchmarks.fidelity.texts import optics

HEADS = 8
NUM_QUERIES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a GGUF file")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", default="4,12,20,27")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(options.model))
    token_ids = tokenizer(optics()).input_ids[: options.tokens]
    model = load_model(options.model)
    captured = capture(model, token_ids, NUM_QUERIES)
    layers = [int(layer) for layer in options.layers.split(",")]
    per_layer = HEADS // len(layers)
    heads = [layer * captured.num_kv_heads + nth for layer in layers for nth in range(per_layer)]
    # [8, T, D], [8, T, D], [8, G, N, D]
    kept = {
        name: getattr(captured, name)[heads].half().contiguous()
        for name in ("keys", "values", "queries")
    }
    inverse_frequency = model.get_decoder().rotary_emb.inv_freq
    torch.save(kept | {"inverse_frequency": inverse_frequency}, options.out)
    print({name: tuple(tensor.shape) for name, tensor in kept.items()})


if __name__ == "__main__":
    main()
