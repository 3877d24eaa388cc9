"""Decode attention as others do it, over the same slots: FlashInfer and SGLang's Triton kernel."""

from __future__ import annotations

import torch

from benchmarks.timing import time_graph
from tests.decode_case import DecodeCase


def dense_flashinfer(layers: list[DecodeCase], out: torch.Tensor):
    """FlashInfer's paged decode over the same slots, one call per layer."""
    import flashinfer

    case = layers[0]
    num_kv_heads, head_dim = case.k_cache.shape[1:]
    lengths = torch.tensor([0] + [len(row.slots) for row in case.rows])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        lengths.cumsum(0).int().cuda(),
        torch.cat([row.slots for row in case.rows]).int(),
        torch.ones(len(case.rows), dtype=torch.int32, device="cuda"),
        case.q.shape[1],
        num_kv_heads,
        head_dim,
        1,
        q_data_type=case.q.dtype,
        kv_data_type=case.q.dtype,
    )

    def call(layer: DecodeCase):
        return wrapper.run(
            layer.q, (layer.k_cache.unsqueeze(1), layer.v_cache.unsqueeze(1)), out=out
        )

    return [lambda layer=layer: call(layer) for layer in layers]


def selected_flashinfer(layers: list[DecodeCase]):
    """FlashInfer over the tokens that the last step selected, one call per layer."""
    import flashinfer

    case, workspace = layers[0], layers[0].workspace
    num_rows, num_kv_heads = len(case.rows), workspace.num_kv_heads
    counts = workspace.num_selected_tokens[:num_rows]
    heads = torch.arange(num_kv_heads, device="cuda")
    # [rows, H, capacity] pages of one head of one slot
    pages = workspace.selected_slots[:num_rows] * num_kv_heads + heads[:, None]
    is_selected = torch.arange(pages.shape[2], device="cuda") < counts.unsqueeze(-1)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    indptr = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0)).int()
    wrapper.plan(
        indptr,
        pages[is_selected].int(),
        torch.ones(num_rows * num_kv_heads, dtype=torch.int32, device="cuda"),
        workspace.gqa_group_size,
        1,
        workspace.head_dim,
        1,
        q_data_type=case.q.dtype,
        kv_data_type=case.q.dtype,
    )
    q = case.q.view(num_rows * num_kv_heads, -1, workspace.head_dim)
    out = torch.empty_like(q)

    def call(layer: DecodeCase):
        cache = [kv.view(-1, 1, 1, workspace.head_dim) for kv in (layer.k_cache, layer.v_cache)]
        return wrapper.run(q, tuple(cache), out=out)

    return [lambda layer=layer: call(layer) for layer in layers]


def dense_sglang(layers: list[DecodeCase], out: torch.Tensor):
    """SGLang's Triton decode, with the split count its backend would choose at most."""
    from sglang.kernels.ops.attention import decode_attention

    case = layers[0]
    rows, q_heads, head_dim = case.q.shape
    splits = 16
    logits = torch.empty(rows, q_heads, splits, head_dim, device="cuda")
    lse = torch.empty(rows, q_heads, splits, device="cuda")
    lengths = torch.tensor([0] + [len(row.slots) for row in case.rows])
    indptr = lengths.cumsum(0).int().cuda()
    indices = torch.cat([row.slots for row in case.rows]).to(torch.int64)
    num_splits = torch.full((rows,), splits, dtype=torch.int32, device="cuda")

    def call(layer: DecodeCase):
        decode_attention.decode_attention_fwd(
            layer.q, layer.k_cache, layer.v_cache, out, indptr, indices, logits, lse, num_splits,
            splits, layer.sm_scale, 1.0, 1.0,
        )  # fmt: skip

    return [lambda layer=layer: call(layer) for layer in layers]


def dense_error(case: DecodeCase, out: torch.Tensor) -> float:
    """Relative error of the first row against dense attention in float32."""
    slots = case.rows[0].slots
    keys = case.k_cache[slots].float().transpose(0, 1)
    values = case.v_cache[slots].float().transpose(0, 1)
    q = case.q[0].float().view(keys.shape[0], -1, keys.shape[2])
    truth = ((q @ keys.mT) * case.sm_scale).softmax(-1) @ values
    return ((out[0].float().view_as(truth) - truth).norm() / truth.norm()).item()


def time_dense(layers: list[DecodeCase], providers: list[str]) -> dict[str, tuple]:
    results = {}
    for provider in providers:
        # its offsets are int32: 2^31 elements of KV is beyond it
        if provider == "sglang-triton" and layers[0].k_cache.numel() >= 1 << 31:
            continue
        out = torch.full_like(layers[0].q, torch.nan)
        make = {"flashinfer": dense_flashinfer, "sglang-triton": dense_sglang}[provider]
        try:
            calls = make(layers, out)
            calls[0]()
            error = dense_error(layers[0], out)
            results[provider] = (time_graph(calls, replays=20), error)
        except Exception as error:
            print(f"  {provider}: {type(error).__name__}: {str(error)[:150]}", flush=True)
    return results


def time_selected(layers: list[DecodeCase]) -> float | None:
    """Microseconds of selected_flashinfer; None, with the reason printed, where it does not run."""
    try:
        return time_graph(selected_flashinfer(layers), replays=20).p50_us
    except Exception as error:
        print(f"  flashinfer, selected: {type(error).__name__}: {str(error)[:150]}", flush=True)
        return None


def flashinfer_version(providers: list[str]) -> str:
    if "flashinfer" not in providers:
        return ""
    import flashinfer

    return flashinfer.__version__
