"""Which strongly attended tokens a method leaves out, and why its ranking missed them.

    python -m benchmarks.fidelity.misses MODEL TEXTS.json --name numbers --csv OUT.csv

A strong token is the most attended clustered token of a (head, position), where it holds at least
--share of the probability. Of those the table says how many were not attended to exactly, how far
down the ranking their cluster stood, and how they lay in it: the size of the cluster, and by how
much the token's logit exceeds the centroid's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.fidelity.block import Block, decode_blocks
from benchmarks.fidelity.capture import capture
from benchmarks.fidelity.catalog import methods
from benchmarks.fidelity.checkpoint import load_model
from benchmarks.fidelity.index_store import IndexStore
from benchmarks.fidelity.methods import selection
from benchmarks.fidelity.methods.base import paper_bytes
from benchmarks.fidelity.methods.multipole import Multipole, members_of
from benchmarks.fidelity.metrics import block_at
from benchmarks.fidelity.sweep import write_row
from benchmarks.versions import commit_of_rows


def strong_tokens(block: Block, method: Multipole, indexes: IndexStore, budget: int, share: float):
    """One row [layer, missed, rank, cluster size, logit excess] per strong token of the block."""
    segments = indexes.segments(block, method.clusterer)
    sizes = torch.cat([s.sizes for s in segments], -1)
    scores, variance, log_mass = method.estimate(block, segments, sizes)
    choices = method.choices
    ranks = selection.rank_score(
        scores, variance, log_mass, block.always_lse, choices.score, choices.group
    )
    tokens = method.affordable_tokens(block, paper_bytes(block, budget), method.index_bytes(block))
    chosen = members_of(method.select(block, ranks, sizes, tokens), segments)

    top, token = block.candidates.max(-1)
    strong = (top - block.dense_lse).exp() >= share
    h, g, n = strong.nonzero(as_tuple=True)
    token = token[h, g, n]
    ids, first = [], 0
    for segment in segments:
        ids.append(segment.cluster_ids + first)
        first += segment.sizes.shape[-1]
    cluster = torch.cat(ids, -1)[h, token]
    better = (ranks[h, n] > ranks[h, n, cluster][:, None]).sum(-1)
    layer = (h + (block.heads.start or 0)) // block.num_kv_heads
    return torch.stack(
        [
            layer.float(),
            (~chosen[h, n, token]).float(),
            better.float(),
            sizes[h, cluster].float(),
            top[h, g, n] - scores[h, g, n, cluster],
        ],
        -1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--name", default="numbers-dev")
    parser.add_argument("--methods", nargs="*", default=["ours"])
    parser.add_argument("--budgets", nargs="*", type=int, default=[128, 512])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--decoded", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--layers", nargs="*", type=int, help="all if left out")
    parser.add_argument("--csv", type=Path, help="append a row per method and budget")
    parser.add_argument("--commit", default="", help="where there is no git repository")
    args = parser.parse_args()

    commit = commit_of_rows(args.commit) if args.csv else ""
    model = load_model(args.model)
    text = next(t for t in json.loads(args.texts.read_text()) if t["name"] == args.name)
    dense = capture(model, text["token_ids"][: args.tokens], args.decoded)
    num_layers = len(dense.keys) // dense.num_kv_heads
    layers = args.layers or list(range(num_layers))
    heads = torch.arange(len(dense.keys)).view(num_layers, -1)[layers].flatten()
    dense = replace(
        dense, queries=dense.queries[heads], keys=dense.keys[heads], values=dense.values[heads]
    )
    indexes = IndexStore(dense, len(dense.token_ids))
    for method in methods(args.methods):
        for budget in args.budgets:
            rows = []
            for begin, end, extent in decode_blocks(dense.prefix_len, len(dense.token_ids)):
                for first in range(0, len(dense.keys), 15):
                    heads = slice(first, min(first + 15, len(dense.keys)))
                    block = block_at(dense, begin, end, extent, heads, args.stride)
                    rows.append(strong_tokens(block, method, indexes, budget, args.share))
            table = torch.cat(rows)
            missed = table[table[:, 1] > 0]
            found = table[table[:, 1] == 0]
            print(f"{args.name} {method.name} {budget}: {len(table)} strong tokens")
            print(f"  missed {len(missed) / len(table):.4f}")
            for what, part in (("missed", missed), ("found", found)):
                rank, size, excess = part[:, 2:].median(0).values.tolist()
                print(
                    f"  {what}: median rank {rank:.0f}, cluster size {size:.0f}, "
                    f"logit above its centroid {excess:.2f}"
                )
            by_layer = missed[:, 0].long().bincount(minlength=len(layers)).tolist()
            counts = dict(zip(layers, by_layer, strict=True))
            worst = sorted(counts, key=counts.get, reverse=True)[:5]
            print("  misses by layer:", {layer: counts[layer] for layer in worst})
            if args.csv:
                row = {"commit": commit, "torch": torch.__version__, "device": "cpu"}
                row |= {"model": Path(args.model).stem, "name": args.name}
                row |= {"seed": text["seed"]}
                row |= {k: getattr(args, k) for k in ("tokens", "decoded", "stride", "share")}
                row |= {"layers": " ".join(map(str, layers)), "method": method.name}
                row |= {"budget": budget, "strong": len(table), "missed": len(missed)}
                row |= {"missed_by_layer": " ".join(map(str, by_layer))}
                write_row(args.csv, list(row), row)


if __name__ == "__main__":
    main()
