"""What float16 features do to clusters: the kernels, the float32 reference and other seeds.

    TRITON_INTERPRET=1 python -m benchmarks.clustering_precision KEYS.pt --csv out.csv

KEYS.pt is of benchmarks.capture_keys. The text's tokens are clustered in segments of 2048, the last
one open; a query of its end attends to them by reference.multipole_attention, whose summaries are
float32 in all rows, so that they differ by the clusters alone. Error: |out - dense| / |dense| per
query head. Other seeds: the reference's, placed as for another segment of the sequence.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.csv_file import write_rows
from benchmarks.versions import versions
from multipole_kernels import reference
from multipole_kernels.clustering_batch import ClusteringGeometry, make_layer_table
from multipole_kernels.segment_clustering import SegmentClustering
from sglang_multipole.config import MultipoleConfig
from tests.clustering_case import ClusteringCase, make_pool

SEGMENT_SIZE = 2048
NUM_RECENT = 256  # tokens, exact
OTHER_SEEDS = 1000  # added to a segment's number
NUM_QUERIES = 32
BUDGETS = (128, 512)


def make_case(kept: dict[str, torch.Tensor], config: MultipoleConfig) -> ClusteringCase:
    """The captured keys as a KV pool of one layer, one request in the order of its tokens."""
    keys, values = (kept[name].transpose(0, 1).contiguous() for name in ("keys", "values"))
    num_tokens, num_kv_heads, head_dim = keys.shape
    angle = torch.arange(num_tokens)[:, None] * kept["inverse_frequency"].float()
    geometry = ClusteringGeometry(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_half=angle.shape[1],
        kv_dtype=keys.dtype,
        segment_size=SEGMENT_SIZE,
        num_sink_tokens=config.num_sink_tokens,
        tokens_per_cluster=config.tokens_per_cluster,
        max_cluster_size=config.max_cluster_size,
        num_lloyd_iters=config.num_lloyd_iters,
    )
    num_segments = -(-num_tokens // SEGMENT_SIZE)
    pool = make_pool(geometry, 1, num_segments + 1, config.clusters_per_segment, None, "cpu")
    cos, sin = angle.cos(), angle.sin()
    req_to_token = torch.arange(num_tokens, dtype=torch.int32)[None]
    table = make_layer_table([keys], [values], [cos], [sin])
    clustering = SegmentClustering(geometry, pool, table, req_to_token)
    return ClusteringCase(geometry, [keys], [values], [cos], [sin], req_to_token, pool, clustering)


def cluster_ids_of(
    case: ClusteringCase, variant: str, orders: list[tuple[int, int, int, int]]
) -> list[torch.Tensor]:
    """[H, T] of each order."""
    if variant == "kernels":
        case.clustering.cluster(orders)
        return [case.cluster_ids(0, *order) for order in orders]
    shift = OTHER_SEEDS if variant == "other seeds" else 0
    return [
        reference.cluster_segment(
            case.features(0, *order[:3]),
            -(-len(case.tokens(*order[:3])[0]) // case.geometry.tokens_per_cluster),
            case.geometry.max_cluster_size,
            case.geometry.num_lloyd_iters,
            order[1] + shift,
        )
        for order in orders
    ]


def squared_distance(
    case: ClusteringCase, orders: list[tuple[int, int, int, int]], ids: list[torch.Tensor]
) -> float:
    total = 0.0
    for order, of_order in zip(orders, ids, strict=True):
        features = case.features(0, *order[:3])
        clusters = int(of_order.max()) + 1
        means = reference.cluster_means(features, of_order, clusters).nan_to_num(0.0)
        nearest = means.gather(-2, of_order.unsqueeze(-1).expand(features.shape))
        total += (features - nearest).square().sum().item()
    return total


def attention_errors(
    case: ClusteringCase,
    queries: torch.Tensor,
    orders: list[tuple[int, int, int, int]],
    ids: list[torch.Tensor],
    budget: int,
    config: MultipoleConfig,
) -> torch.Tensor:
    """[queries, H * G] relative errors of queries [queries, H * G, D]."""
    keys, values = case.keys[0].float(), case.values[0].float()
    num_tokens, num_kv_heads, head_dim = keys.shape
    all_ids = torch.full((num_kv_heads, num_tokens), -1)
    summaries, weights, first = [], [], 0
    for order, of_order in zip(orders, ids, strict=True):
        positions, slots = case.tokens(*order[:3])
        clusters = -(-len(positions) // case.geometry.tokens_per_cluster)
        own = reference.summarize_clusters(
            keys[slots].transpose(0, 1), values[slots].transpose(0, 1), of_order, clusters
        )
        all_ids[:, positions] = of_order + first
        first += clusters
        summaries.append(own[:4])
        weights.append(own.pair_weight.unsqueeze(1).expand(-1, clusters, -1))
    summary = [torch.cat(parts, 1) for parts in zip(*summaries, strict=True)]
    scale = head_dim**-0.5
    errors = []
    for q in queries:
        out, _, _ = reference.multipole_attention(
            q, keys, values, all_ids, *summary, torch.cat(weights, 1), budget, scale,
            config.max_logit_variance,
        )  # fmt: skip
        grouped = q.view(num_kv_heads, -1, head_dim)
        weight = (grouped @ keys.permute(1, 2, 0) * scale).softmax(-1)
        dense = (weight @ values.transpose(0, 1)).reshape(out.shape)
        errors.append((out - dense).norm(dim=-1) / dense.norm(dim=-1))
    return torch.stack(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--csv", type=Path, default=Path("clustering_precision.csv"))
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    config = MultipoleConfig(segment_size=SEGMENT_SIZE)
    kept = torch.load(options.keys)
    case = make_case(kept, config)
    num_tokens = len(case.keys[0])
    clustered = num_tokens - NUM_RECENT
    orders = [
        (0, nth, min(SEGMENT_SIZE, clustered - nth * SEGMENT_SIZE), nth + 1)
        for nth in range(-(-clustered // SEGMENT_SIZE))
    ]
    # [positions, H * G, D], at the text's end
    queries = kept["queries"].float().permute(2, 0, 1, 3).flatten(1, 2)[-NUM_QUERIES:]
    expected = cluster_ids_of(case, "float32", orders)
    least = squared_distance(case, orders, expected)
    rows: list[dict[str, Any]] = []
    for variant in ("float32", "kernels", "other seeds"):
        ids = cluster_ids_of(case, variant, orders)
        same = [(a == b).float().mean().item() for a, b in zip(ids, expected, strict=True)]
        for budget in BUDGETS:
            errors = attention_errors(case, queries, orders, ids, budget, config)
            rows.append(
                versions(options.commit)
                | {
                    "clusters": variant,
                    "budget": budget,
                    "mean_error": errors.mean().item(),
                    "p95_error": errors.flatten().quantile(0.95).item(),
                    "objective_ratio": squared_distance(case, orders, ids) / least,
                    "tokens_in_the_same_cluster": sum(same) / len(same),
                }
            )
            print(rows[-1], flush=True)
            write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
