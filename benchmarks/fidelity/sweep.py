"""Run methods over texts and append one row per (text, method, budget) to a CSV.

    python -m benchmarks.fidelity.sweep MODEL TEXTS.json OUT.csv --split test --methods paper ours

Budgets are named by the paper's exact tokens: at budget 512 every method may read as many bytes
as the paper's bf16 index at 1/16 and 512 tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from benchmarks.fidelity.capture import Capture, capture
from benchmarks.fidelity.catalog import methods, ours
from benchmarks.fidelity.checkpoint import load_model
from benchmarks.fidelity.index_store import IndexStore
from benchmarks.fidelity.methods.base import Method
from benchmarks.fidelity.methods.features import Calibration
from benchmarks.fidelity.metrics import attention_errors, teacher_forced


def attention_row(errors, num_kv_heads: int) -> dict[str, float]:
    """Summary of AttentionErrors."""
    error = errors.error.double()
    by_layer = error.unflatten(0, (-1, num_kv_heads)).mean((1, 2, 3))
    sample = error.flatten()
    # quantile() takes at most 2**24 numbers
    sample = sample[:: max(1, len(sample) // 2**23)]
    return {
        "error_mean": error.mean().item(),
        "error_median": sample.median().item(),
        "error_p95": sample.quantile(0.95).item(),
        "error_worst_layer": by_layer.max().item(),
        "worst_layer": int(by_layer.argmax()),
        "mass_mean": errors.mass.double().mean().item(),
        "exact_tokens_mean": errors.tokens.double().mean().item(),
        "bytes_mean": errors.bytes.double().mean().item(),
    }


def divergence_row(divergence) -> dict[str, float]:
    """Summary of Divergence; the standard error is over positions, in batches of 32."""
    kl = divergence.kl.double()
    batches = kl[: len(kl) // 32 * 32].view(-1, 32).mean(-1)
    return {
        "kl_mean": kl.mean().item(),
        "kl_sem": (batches.std() / len(batches) ** 0.5).item() if len(batches) > 1 else 0.0,
        "kl_median": kl.median().item(),
        "kl_p99": kl.quantile(0.99).item(),
        "kl_max": kl.max().item(),
        "top1": divergence.agrees.double().mean().item(),
        "first_divergence": divergence.first,
        "kl_tokens_mean": divergence.tokens.item(),
    }


def versions(model: torch.nn.Module, path: str) -> dict[str, str]:
    """What a row must say so that it can be repeated."""
    cuda = model.device.type == "cuda"
    return {
        "model": Path(path).stem,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def sweep_text(
    model, text: Capture, chosen: list[Method], budgets: list[int], what: str
) -> Iterator[dict]:
    """Rows of all methods and budgets on one captured text."""
    shared: dict = {}
    whole = IndexStore(text, len(text.token_ids), shared)
    prefix = IndexStore(text, text.prefix_len, shared)
    heads_at_once = len(text.keys) if text.keys.is_cuda else 15
    for method in chosen:
        for budget in budgets:
            started = time.perf_counter()
            row = {"method": method.name, "budget": budget}
            if "attention" in what:
                errors = attention_errors(text, method, budget, whole, heads_at_once)
                row |= attention_row(errors, text.num_kv_heads)
            if "kl" in what:
                row |= divergence_row(teacher_forced(model, text, method, budget, prefix))
            row["seconds"] = round(time.perf_counter() - started, 3)
            yield row
        # of the clusterings, only the default one is of use to the methods that follow
        for place in [p for p in shared if p[0] != ours().clusterer.key]:
            del shared[place]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--names", nargs="*", help="texts to run, all of the split if left out")
    parser.add_argument("--methods", nargs="*", help="all of the catalog if left out")
    parser.add_argument("--budgets", nargs="*", type=int, default=[128, 512])
    parser.add_argument("--what", nargs="*", default=["attention", "kl"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--decoded", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="keep the model's first layers only")
    parser.add_argument("--calibrate-on", default="argparse", help="a text of the dev split")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.perf_counter()
    model = load_model(args.model, args.device, args.layers)
    texts = json.loads(args.texts.read_text())
    source = next((t for t in texts if t["name"] == args.calibrate_on), None)
    calibration = None
    if source is not None:
        tokens = source["token_ids"][: args.tokens]
        calibration = Calibration.of_capture(capture(model, tokens, args.decoded))
    chosen = methods(args.methods, calibration)
    common = versions(model, args.model) | {"tokens": args.tokens, "decoded": args.decoded}
    for text in texts:
        if text["split"] != args.split or (args.names and text["name"] not in args.names):
            continue
        dense = capture(model, text["token_ids"][: args.tokens], args.decoded)
        label = {key: text[key] for key in ("split", "kind", "name")}
        for row in sweep_text(model, dense, chosen, args.budgets, args.what):
            write_row(args.out, common | label | row)
            numbers = (f"{k}={v:.4g}" for k, v in row.items() if isinstance(v, float))
            print(text["name"], row["method"], row["budget"], *numbers, flush=True)
            if time.perf_counter() - started > args.seconds:
                print("out of time")
                return


def write_row(path: Path, row: dict) -> None:
    """Append a row to a CSV; the first row names the columns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
