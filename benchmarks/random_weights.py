"""Norm weights of 1 for a server with random weights, which makes its attention scores differ."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_multipole.local_server import LocalServer


def set_norms_to_one(server: LocalServer, model_path: Path) -> None:
    """Give the server's Qwen3, of the configuration in model_path, norm weights of 1.

    Raises:
        RuntimeError: the server refused them.
    """
    config = json.loads((model_path / "config.json").read_text())
    hidden = torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    head = torch.ones(config["head_dim"], dtype=torch.bfloat16)
    norms = {"model.norm.weight": hidden.clone()}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            norms[f"{prefix}{name}.weight"] = hidden.clone()
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            norms[f"{prefix}{name}.weight"] = head.clone()
    with tempfile.TemporaryDirectory() as folder:
        save_file(norms, Path(folder) / "model.safetensors")
        body = {"model_path": folder, "load_format": "safetensors", "flush_cache": True}
        answer = server.post("/update_weights_from_disk", body)
    if not answer["success"]:
        raise RuntimeError(f"random_weights: {answer['message']}")
