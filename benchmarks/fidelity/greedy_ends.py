"""Replace the end of every text by what the dense model writes there greedily.

    python -m benchmarks.fidelity.greedy_ends MODEL TEXTS.json OUT.json --split test --device cuda

On such a text the first position at which a sparse run's first choice differs is where free greedy
decoding would part from the dense model's: up to there both have read the same tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.fidelity.checkpoint import load_model
from benchmarks.fidelity.generations import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--names", nargs="*", help="texts to continue, all of the split if left out"
    )
    parser.add_argument("--decoded", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_model(args.model, args.device)
    texts = [
        t
        for t in json.loads(args.texts.read_text())
        if t["split"] == args.split and (not args.names or t["name"] in args.names)
    ]
    length = len(texts[0]["token_ids"])
    prompts = [torch.tensor(t["token_ids"][: length - args.decoded]) for t in texts]
    written = sample(model, prompts, length, [], 0, temperature=0).tolist()
    rows = [t | {"token_ids": w, "greedy": True} for t, w in zip(texts, written, strict=True)]
    args.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
