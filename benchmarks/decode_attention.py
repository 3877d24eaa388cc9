"""Decode attention on one GPU: multipole against FlashInfer's dense paged decode.

    python -m benchmarks.decode_attention --csv decode_attention.csv [--commit HASH]

Per shape: the output is checked against the float32 reference first; then the three launches of a
layer are timed together and one by one, in CUDA-graph replays over several layers' inputs, so that
each finds L2 cold. The plan, once a step, is counted as 1 / NUM_LAYERS. Keys are a mixture with
position structure (tests/decode_case.py), really clustered; slots lie in no order.

Columns: bytes are what must be read and written once (centroids, selected and always-exact tokens,
weights written and read); share_of_read is their rate over the card's measured read bandwidth.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys

import torch
import triton

from benchmarks.timing import (
    Quantiles,
    copies_for_cold_l2,
    copy_bandwidth,
    copy_layer,
    read_bandwidth,
    time_graph,
)
from benchmarks.tune import CENTROIDS, relative_error, stage_calls
from multipole_kernels import reference
from multipole_kernels.decode_plan import plan_chunks
from tests.decode_case import DecodeCase, make_case

NUM_LAYERS = 36
NUM_RECENT = 200  # between one and two recluster intervals
MAX_RELATIVE_ERROR = 6e-3  # bfloat16 against float32
# clusters that rank alike to the rounding of their float16 weights may be taken either way
MAX_DIFFERENT = 0.02
# contexts x batches x budgets in tokens, or a share of the context
SHAPES = {
    (131072, 16): (512, 1024, 0.05, 0.1),
    (131072, 1): (512, 1024, 0.05),
    (131072, 4): (1024, 0.05),
    (32768, 16): (128, 512, 1024, 0.05, 0.1),
    (32768, 1): (512, 1024),
    (8192, 16): (512, 1024),
    (8192, 1): (512, 1024),
    (32768, 4): (512, 1024),
    (8192, 4): (512, 1024),
    (524288, 1): (1024,),
}


def with_centroids(case: DecodeCase, name: str) -> DecodeCase:
    """The case with centroids of another dtype, from those in the model's."""
    dtype = CENTROIDS[name]
    case = dataclasses.replace(case, pool_layer=dataclasses.replace(case.pool_layer))
    if dtype is not None:
        pool = case.pool_layer
        pool.key_centroids, pool.key_scale = reference.quantize_centroids(
            pool.key_centroids.float(), dtype
        )
        pool.value_centroids, pool.value_scale = reference.quantize_centroids(
            pool.value_centroids.float(), dtype
        )
    return case


def bytes_moved(case: DecodeCase) -> int:
    """Bytes of one layer's step."""
    workspace, pool = case.workspace, case.pool_layer
    heads, head_dim = workspace.num_kv_heads, workspace.head_dim
    items = int(case.plan.item_indptr[-1])
    clusters = items * heads * workspace.clusters_per_segment
    size = pool.key_centroids.element_size()
    per_cluster = 2 * head_dim * size + 2 + 4 + (8 if size == 1 else 0)
    per_cluster += 2 * 2 * workspace.gqa_group_size  # weights, written and read
    exact = int(case.plan.exact_indptr[-1]) * heads
    selected = int(workspace.num_selected_tokens[: len(case.rows)].sum())
    return clusters * per_cluster + (exact + selected) * 2 * head_dim * 2


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


def bench_shape(context, batch, budgets, num_kv_heads, options, environment) -> list[dict]:
    budgets = [budget if budget >= 1 else int(budget * context) for budget in budgets]
    base = make_case(
        [context] * batch,
        [max(budgets)] * batch,
        num_kv_heads=num_kv_heads,
        gqa_group_size=32 // num_kv_heads if num_kv_heads == 8 else 8,
        head_dim=128,
        segment_size=1024,
        clusters_per_segment=64,
        recent=NUM_RECENT,
    )
    kv_bytes = 2 * context * batch * num_kv_heads * 128 * 2
    copies = copies_for_cold_l2(base.pool_layer.key_centroids.nbytes)
    layers = [base] + [copy_layer(base) for _ in range(copies - 1)]
    dense = time_dense(layers, options.dense)
    print(f"\n{context} x {batch}, {num_kv_heads} KV heads, {copies} layers", flush=True)
    rows = []

    def add(provider, quantiles, moved, **columns):
        seconds = quantiles.p50_us * 1e-6
        rows.append(
            environment
            | {
                "provider": provider,
                "context": context,
                "batch": batch,
                "num_kv_heads": num_kv_heads,
                **dataclasses.asdict(quantiles),
                "bytes": moved,
                "gb_per_s": moved / seconds / 1e9,
                "share_of_read": moved / seconds / environment["read_bytes_per_s"],
            }
            | columns
        )

    for provider, (quantiles, error) in dense.items():
        add(provider, quantiles, kv_bytes, relative_error=error)
        print(f"  {provider:22s} {quantiles.p50_us:8.1f} us  error {error:.1e}", flush=True)
    for name in options.centroids:
        named = [with_centroids(layer, name) for layer in layers]
        for budget in budgets:
            case = named[0]
            case.budgets = [budget] * batch
            for layer in named:
                layer.plan.token_budget.fill_(budget)
            out = torch.full_like(case.q, torch.nan)
            calls = stage_calls(named, out, {})
            error, different, expected = relative_error(case, out, 0)
            if not error <= MAX_RELATIVE_ERROR or different > MAX_DIFFERENT * expected:
                print(f"  {name}, budget {budget}: error {error:.1e}, {different} of {expected}")
                options.failed = True
                continue
            stages = {stage: time_graph(calls[stage], replays=20) for stage in calls}
            plan = time_graph([lambda case=case: plan_chunks(case.plan, case.workspace, batch)])
            whole = stages["all"]
            add_us = plan.p50_us / NUM_LAYERS
            total = Quantiles(whole.p20_us + add_us, whole.p50_us + add_us, whole.p80_us + add_us)
            moved = bytes_moved(case)
            selected = case.workspace.num_selected_tokens[:batch].float()
            columns = {
                "centroids": name,
                "budget": budget,
                "relative_error": error,
                "clusters_selected_differently": different,
                "mean_selected_tokens": selected.mean().item(),
                "plan_us": plan.p50_us,
                **{f"{stage}_us": stages[stage].p50_us for stage in ("coarse", "select", "exact")},
            }
            if "flashinfer" in dense:
                columns["ratio_to_flashinfer"] = dense["flashinfer"][0].p50_us / total.p50_us
            add("multipole", total, moved, **columns)
            print(
                f"  {name:5s} budget {budget:6d} {total.p50_us:8.1f} us = coarse "
                f"{columns['coarse_us']:.1f} select {columns['select_us']:.1f} exact "
                f"{columns['exact_us']:.1f}; x{columns.get('ratio_to_flashinfer', 0):.2f}, "
                f"{rows[-1]['share_of_read']:.0%} of read; error {error:.1e}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", default="decode_attention.csv")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--centroids", default="bf16,int8,fp8")
    parser.add_argument("--dense", default="flashinfer,sglang-triton")
    parser.add_argument("--contexts", default="", help="only these, comma separated")
    options = parser.parse_args()
    options.failed = False
    options.centroids = options.centroids.split(",")
    options.dense = [name for name in options.dense.split(",") if name]
    contexts = {int(context) for context in options.contexts.split(",") if context}
    environment = {
        "commit": options.commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": copy_bandwidth(),
        "read_bytes_per_s": read_bandwidth(),
    }
    print(environment)
    rows: list[dict] = []
    for (context, batch), budgets in SHAPES.items():
        if contexts and context not in contexts:
            continue
        rows += bench_shape(context, batch, budgets, 8, options, environment)
        torch.cuda.empty_cache()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    if options.failed:
        sys.exit("a result was wrong and was not timed")


if __name__ == "__main__":
    main()
