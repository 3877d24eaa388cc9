"""What tests of real servers share: a text, asking, the server's state, flushes, going away."""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from safetensors.torch import load_file, save_file

from sglang_multipole.local_server import LocalServer

# about four characters a token
TEXT = " ".join(topics[name] for name in sorted(topics))
# below, around and above the gate of most tests' servers
SHORT = "The capital of France is"
MIDDLE = TEXT[6000:8600]
LONG = TEXT[:5500] + "\n\nIn short, the statement"


def ask(
    server: LocalServer,
    prompt: str | list[int],
    num_tokens: int = 12,
    sampling: dict[str, Any] | None = None,
    **body: Any,
) -> dict[str, Any]:
    """A greedy answer of num_tokens tokens to a text or token ids; body goes into the request."""
    greedy = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    key = "text" if isinstance(prompt, str) else "input_ids"
    return server.post(
        "/generate", {key: prompt, "sampling_params": greedy | (sampling or {}), **body}
    )


def activity(answer: dict[str, Any]) -> dict[str, int]:
    """The proof of activity that came with an answer."""
    return answer["meta_info"]["multipole"]


def state(server: LocalServer) -> dict[str, Any]:
    """The multipole part of /server_info."""
    return json.loads(server.get("/server_info"))["internal_states"][0]["multipole"]


def flush(server: LocalServer) -> None:
    """Empty both pools, once no request runs; with check_integrity they are compared before."""
    request = urllib.request.Request(f"{server.base_url}/flush_cache?timeout=30", method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
    pool = state(server)["pool"]
    assert pool["free"] == pool["places"]


def make_other_weights(model_path: Path, folder: Path) -> Path:
    """The model with larger keys and smaller values, so with other clusters, in a new folder."""
    shutil.copytree(model_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model_path / "model.safetensors")
    for name in tensors:
        if name.endswith("k_proj.weight"):
            tensors[name] *= 1.25
        elif name.endswith("v_proj.weight"):
            tensors[name] *= 0.75
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def update_weights(server: LocalServer, model_path: Path) -> None:
    """Load other weights into the running server; the flush that comes with it frees all places."""
    body = {"model_path": str(model_path), "flush_cache": True}
    assert server.post("/update_weights_from_disk", body)["success"]
    pool = state(server)["pool"]
    assert pool["free"] == pool["places"]


def abandon(server: LocalServer, prompt: str) -> None:
    """Ask for a long answer and go away after its first token."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = {
        "text": prompt,
        "stream": True,
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
    }
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()
