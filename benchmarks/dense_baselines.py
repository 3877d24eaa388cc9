"""Decode attention as others do it, over the same slots: FlashInfer and SGLang's Triton kernel.

flashinfer      its paged decode, page size 1, plans made beforehand
sglang-triton   SGLang's Triton decode with the splits that its backend has at most
triton-dense    the same kernel with a split for every 2048 tokens where those are more: it uses the
                whole card also for one request, as the Triton baseline of the paper's claim does
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.timing import Quantiles, time_graph
from tests.decode_case import DecodeCase

SGLANG_SPLITS = 16
TOKENS_PER_SPLIT = 2048
MAX_GROUPS = 16  # each needs a plan of its own
_WORKSPACE_BYTES = 256 << 20


def dense_flashinfer(groups: list[DecodeCase], out: torch.Tensor) -> list[Callable]:
    """FlashInfer's paged decode over the rows' slots, one call a group."""
    num_kv_heads, head_dim = groups[0].k_cache.shape[1:]
    case = groups[0]
    lengths = torch.tensor([0] + [len(row.slots) for row in case.rows]).cumsum(0).int().cuda()
    cache = (case.k_cache.unsqueeze(1), case.v_cache.unsqueeze(1))
    wrappers = _planned(
        [lengths] * len(groups),
        [torch.cat([row.slots for row in group.rows]).int() for group in groups],
        (case.q.shape[1], num_kv_heads, head_dim),
        case.q.dtype,
    )
    return [
        functools.partial(wrapper.run, group.q, cache, out=out)
        for wrapper, group in zip(wrappers, groups, strict=True)
    ]


def selected_flashinfer(groups: list[DecodeCase], out: torch.Tensor) -> list[Callable]:
    """FlashInfer over the tokens that a step of each group selects, one call a group."""
    case, workspace = groups[0], groups[0].workspace
    num_rows, num_kv_heads = len(case.rows), workspace.num_kv_heads
    head_dim, group_size = workspace.head_dim, workspace.gqa_group_size
    heads = torch.arange(num_kv_heads, device="cuda")
    indptrs, indices = [], []
    for group in groups:
        group.decode(out=out)
        counts = workspace.num_selected_tokens[:num_rows]
        # [rows, H, capacity] pages of one head of one slot
        pages = workspace.selected_slots[:num_rows] * num_kv_heads + heads[:, None]
        is_selected = torch.arange(pages.shape[2], device="cuda") < counts.unsqueeze(-1)
        indptrs.append(torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0)).int())
        indices.append(pages[is_selected].int())
    wrappers = _planned(indptrs, indices, (group_size, 1, head_dim), case.q.dtype)
    cache = tuple(kv.view(-1, 1, 1, head_dim) for kv in (case.k_cache, case.v_cache))
    selected_out = torch.empty_like(case.q.reshape(-1, group_size, head_dim))
    queries = [group.q.reshape(-1, group_size, head_dim) for group in groups]
    return [
        functools.partial(wrapper.run, q, cache, out=selected_out)
        for wrapper, q in zip(wrappers, queries, strict=True)
    ]


def _planned(
    indptrs: list[torch.Tensor],
    indices: list[torch.Tensor],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> list:
    """FlashInfer's wrappers for requests of (query heads, KV heads, head_dim), page size 1."""
    import flashinfer

    # calls follow each other on one stream
    scratch = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrappers = []
    for indptr, group_indices in zip(indptrs, indices, strict=True):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            scratch, "NHD", use_tensor_cores=True
        )
        last_page_len = torch.ones(len(indptr) - 1, dtype=torch.int32, device="cuda")
        wrapper.plan(
            indptr, group_indices, last_page_len, *shape, 1, q_data_type=dtype, kv_data_type=dtype
        )
        wrappers.append(wrapper)
    return wrappers


def dense_triton(groups: list[DecodeCase], out: torch.Tensor, splits: int) -> list[Callable]:
    """SGLang's Triton decode, each row cut into so many splits; one call a group."""
    from sglang.kernels.ops.attention import decode_attention

    case = groups[0]
    rows, q_heads, head_dim = case.q.shape
    logits = torch.empty(rows, q_heads, splits, head_dim, device="cuda")
    lse = torch.empty(rows, q_heads, splits, device="cuda")
    lengths = torch.tensor([0] + [len(row.slots) for row in case.rows])
    indptr = lengths.cumsum(0).int().cuda()
    num_splits = torch.full((rows,), splits, dtype=torch.int32, device="cuda")

    def call(q: torch.Tensor, indices: torch.Tensor):
        decode_attention.decode_attention_fwd(
            q, case.k_cache, case.v_cache, out, indptr, indices, logits, lse, num_splits,
            splits, case.sm_scale, 1.0, 1.0,
        )  # fmt: skip

    return [
        functools.partial(call, group.q, torch.cat([row.slots for row in group.rows]))
        for group in groups
    ]


def dense_error(case: DecodeCase, out: torch.Tensor) -> float:
    """Relative error of the first row against dense attention in float32."""
    slots = case.rows[0].slots
    keys = case.k_cache[slots].float().transpose(0, 1)
    values = case.v_cache[slots].float().transpose(0, 1)
    q = case.q[0].float().view(keys.shape[0], -1, keys.shape[2])
    truth = ((q @ keys.mT) * case.sm_scale).softmax(-1) @ values
    return ((out[0].float().view_as(truth) - truth).norm() / truth.norm()).item()


def time_dense(
    groups: list[DecodeCase], providers: list[str], between: Callable[[], object] | None = None
) -> dict[str, tuple[Quantiles, float]]:
    """Times and errors by provider; what does not run is left out, with the reason printed.

    between: see time_graph.
    """
    groups, results = groups[:MAX_GROUPS], {}
    context = len(groups[0].rows[0].slots)
    splits = {"sglang-triton": SGLANG_SPLITS, "triton-dense": -(-context // TOKENS_PER_SPLIT)}
    for provider in providers:
        if provider == "triton-dense" and splits[provider] <= SGLANG_SPLITS:
            continue
        out = torch.full_like(groups[0].q, torch.nan)
        try:
            if provider == "flashinfer":
                calls = dense_flashinfer(groups, out)
            else:
                calls = dense_triton(groups, out, splits[provider])
            calls[0]()
            error = dense_error(groups[0], out)
            repeats = -(-4 // len(calls))
            times = time_graph(calls, replays=10, repeats=repeats, between=between)
            results[provider] = (times, error)
        except Exception as error:
            print(f"  {provider}: {type(error).__name__}: {str(error)[:150]}", flush=True)
    return results


def time_selected(groups: list[DecodeCase], out: torch.Tensor) -> float | None:
    """Microseconds of selected_flashinfer; None, with the reason printed, where it does not run."""
    try:
        return time_graph(selected_flashinfer(groups[:MAX_GROUPS], out)).p50_us
    except Exception as error:
        print(f"  flashinfer, selected: {type(error).__name__}: {str(error)[:150]}", flush=True)
        return None


def flashinfer_version(providers: list[str]) -> str:
    if "flashinfer" not in providers:
        return ""
    import flashinfer

    return flashinfer.__version__
