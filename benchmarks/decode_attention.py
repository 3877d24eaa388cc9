"""Decode attention on one GPU: multipole against FlashInfer's dense paged decode.

    python -m benchmarks.decode_attention --csv decode_attention.csv [--commit HASH]

Per shape: the output is checked against the float32 reference first; then the three launches of a
layer are timed together and one by one, in CUDA-graph replays over several layers' inputs, so that
each finds L2 cold. The snapshot and the plan, once a step, count as 1 / NUM_LAYERS. Keys are a
mixture with position structure (tests/decode_case.py), really clustered; slots lie in no order.
Segments, clusters and buffers are as a server has them by default.

Columns: bytes are what must be read and written once (centroids, selected and always-exact tokens,
weights written and read); share_of_read is their rate over the card's measured read bandwidth.
exact_flashinfer_us is FlashInfer's paged decode over the selected tokens alone, each (row, KV head)
as a request of its own: what the exact launch would take if it had nothing else to do.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import subprocess
import sys

import torch
import triton

from benchmarks.dense_baselines import flashinfer_version, time_dense, time_selected
from benchmarks.step_work import time_snapshot
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
# (context, batch, KV heads): budgets in tokens, or a share of the context
SHAPES = {
    (131072, 16, 8): (512, 1024, 0.05, 0.1),
    (131072, 4, 8): (512, 1024, 0.05),
    (131072, 1, 8): (512, 1024, 0.05),
    (32768, 16, 8): (512, 1024, 0.05, 0.1),
    (32768, 4, 8): (512, 1024),
    (32768, 1, 8): (512, 1024),
    (8192, 16, 8): (512, 1024),
    (8192, 4, 8): (512,),
    (8192, 1, 8): (512, 1024),
    (65536, 1, 8): (512,),
    (524288, 1, 8): (512, 1024),
    (131072, 16, 4): (512, 1024),
    (32768, 1, 4): (512,),
}
NUM_Q_HEADS, HEAD_DIM = 32, 128
SEGMENT_SIZE, CLUSTERS = 2048, 128
MAX_TOKEN_BUDGET = 4096  # what the buffers are made for, if no budget is larger


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
    per_item = 4 * (head_dim // 2) + 3 * 4 * workspace.gqa_group_size  # pair weight; shift, spread
    exact = int(case.plan.exact_indptr[-1]) * heads
    selected = int(workspace.num_selected_tokens[: len(case.rows)].sum())
    moved = clusters * per_cluster + items * heads * per_item
    return moved + (exact + selected) * 2 * head_dim * 2


def bench_shape(context, batch, budgets, num_kv_heads, options, environment) -> list[dict]:
    budgets = [budget if budget >= 1 else int(budget * context) for budget in budgets]
    base = make_case(
        [context] * batch,
        [max(budgets)] * batch,
        num_kv_heads=num_kv_heads,
        gqa_group_size=NUM_Q_HEADS // num_kv_heads,
        head_dim=HEAD_DIM,
        segment_size=SEGMENT_SIZE,
        clusters_per_segment=CLUSTERS,
        recent=NUM_RECENT,
    )
    kv_bytes = 2 * context * batch * num_kv_heads * HEAD_DIM * 2
    snapshot = time_snapshot(base)
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
        element_size = named[0].pool_layer.key_centroids.element_size()
        for budget in budgets:
            case = named[0]
            case.budgets = [budget] * batch
            for layer in named:
                layer.plan.token_budget.fill_(budget)
            out = torch.full_like(case.q, torch.nan)
            calls = stage_calls(named, out, {}, max(MAX_TOKEN_BUDGET, budget))
            error, different, expected = relative_error(case, out, 0)
            if not error <= MAX_RELATIVE_ERROR or different > MAX_DIFFERENT * expected:
                print(f"  {name}, budget {budget}: error {error:.1e}, {different} of {expected}")
                options.failed = True
                continue
            stages = {stage: time_graph(calls[stage], replays=20) for stage in calls}
            plan = time_graph(
                [
                    lambda case=case, size=element_size: plan_chunks(
                        case.plan, case.workspace, batch, size
                    )
                ]
            )
            whole = stages["all"]
            add_us = (plan.p50_us + snapshot.p50_us) / NUM_LAYERS
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
                "snapshot_us": snapshot.p50_us,
                **{f"{stage}_us": stages[stage].p50_us for stage in ("coarse", "select", "exact")},
            }
            if "flashinfer" in dense:
                columns["ratio_to_flashinfer"] = dense["flashinfer"][0].p50_us / total.p50_us
            if "flashinfer" in dense:
                columns["exact_flashinfer_us"] = time_selected(named)
            add("multipole", total, moved, **columns)
            print(
                f"  {name:5s} budget {budget:6d} {total.p50_us:8.1f} us = coarse "
                f"{columns['coarse_us']:.1f} select {columns['select_us']:.1f} exact "
                f"{columns['exact_us']:.1f}; x{columns.get('ratio_to_flashinfer', 0):.2f}, "
                f"{rows[-1]['share_of_read']:.0%} of read; error {error:.1e}",
                flush=True,
            )
    return rows


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", default="decode_attention.csv")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--centroids", default="bf16,int8")
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
        "driver": driver_version(),
        "flashinfer": flashinfer_version(options.dense),
        "copy_bytes_per_s": copy_bandwidth(),
        "read_bytes_per_s": read_bandwidth(),
    }
    print(environment)
    rows: list[dict] = []
    for (context, batch, num_kv_heads), budgets in SHAPES.items():
        if contexts and context not in contexts:
            continue
        rows += bench_shape(context, batch, budgets, num_kv_heads, options, environment)
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
