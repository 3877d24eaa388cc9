"""Load a causal language model from a local folder or a GGUF file, in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def tokenizer_arguments(path: str) -> dict[str, str]:
    """Arguments of from_pretrained for a checkpoint folder or a .gguf file."""
    if path.endswith(".gguf"):
        file = Path(path)
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return {"pretrained_model_name_or_path": path}


def load_model(path: str, device: str = "cpu", num_layers: int | None = None) -> torch.nn.Module:
    """The model in evaluation mode, float32: KL of 1e-4 must not drown in rounding.

    num_layers keeps the first layers only, for a quick test.
    """
    model = AutoModelForCausalLM.from_pretrained(**tokenizer_arguments(path), dtype=torch.float32)
    if num_layers is not None:
        decoder = model.get_decoder()
        decoder.layers = decoder.layers[:num_layers]
        model.config.num_hidden_layers = len(decoder.layers)
    return model.to(device).eval()
