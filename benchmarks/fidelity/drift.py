"""Does a long decode drift? Error and KL by position, over thousands of appended tokens.

    python -m benchmarks.fidelity.drift MODEL TEXTS.json OUT.csv --methods ours ours-offline paper

A text's first --prefix tokens are prefilled; all others are decoded one by one, segments being
clustered every 128 tokens and sealed when they are full. `ours-offline` clusters the whole prefix
anew every 128 tokens instead. A row is a stretch of positions: the error on the dense run's
queries, keys and values, and the KL of a sparse run whose own keys and values fill the cache.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import torch

from benchmarks.fidelity.capture import Capture, capture
from benchmarks.fidelity.catalog import methods
from benchmarks.fidelity.checkpoint import load_model
from benchmarks.fidelity.index_store import IndexStore
from benchmarks.fidelity.methods.base import Method
from benchmarks.fidelity.metrics import attention_errors, teacher_forced
from benchmarks.fidelity.sweep import divergence_row, versions, write_row

COLUMNS = [
    "commit",
    "model",
    "torch",
    "transformers",
    "device",
    "split",
    "kind",
    "name",
    "prefix",
    "stride",
    "method",
    "budget",
    "begin",
    "end",
    "error_mean",
    "kl_mean",
    "kl_sem",
    "kl_median",
    "kl_p99",
    "kl_max",
    "top1",
    "first_divergence",
    "kl_tokens_mean",
]


def stretches(text: Capture, method: Method, model, args: argparse.Namespace, budget: int):
    """Rows of one method, a stretch of positions each."""
    if "attention" in args.what:
        indexes = IndexStore(text, len(text.token_ids))
        heads_at_once = 45 if text.keys.is_cuda else 15
        errors = attention_errors(text, method, budget, indexes, heads_at_once, args.stride)
    if "kl" in args.what:
        prefix = IndexStore(text, text.prefix_len)
        divergence = teacher_forced(model, text, method, budget, prefix)
    for first in range(0, text.num_decoded, args.stretch):
        end = min(first + args.stretch, text.num_decoded)
        row = {"begin": text.prefix_len + first, "end": text.prefix_len + end}
        if "attention" in args.what:
            # positions are tested from each block's first on: a block is a multiple of stride
            error = errors.error[..., first // args.stride : end // args.stride]
            row["error_mean"] = error.double().mean().item()
        if "kl" in args.what:
            row |= divergence_row(divergence.part(first, end))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=["ours", "ours-offline"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[512])
    parser.add_argument("--what", nargs="+", default=["attention", "kl"])
    parser.add_argument("--prefix", type=int, default=2048, help="tokens; a multiple of 128")
    parser.add_argument("--stretch", type=int, default=1024, help="positions a row")
    parser.add_argument(
        "--stride", type=int, default=8, help="of positions for errors; a power of 2"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default="", help="where there is no git repository")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_model(args.model, args.device)
    for text in json.loads(args.texts.read_text()):
        if text["name"] not in args.names:
            continue
        dense = capture(model, text["token_ids"], len(text["token_ids"]) - args.prefix)
        common = versions(model, args.model, args.commit)
        common |= {k: text[k] for k in ("split", "kind", "name")}
        common |= {"prefix": args.prefix, "stride": args.stride}
        for budget, method in product(args.budgets, methods(args.methods)):
            label = {"method": method.name, "budget": budget}
            for row in stretches(dense, method, model, args, budget):
                write_row(args.out, COLUMNS, common | label | row)
                print(text["name"], method.name, budget, row["begin"], row["end"], flush=True)


if __name__ == "__main__":
    main()
