"""Run methods over texts and append one row per (text, method, budget) to a CSV.

    python -m benchmarks.fidelity.sweep MODEL TEXTS.json OUT.csv --split test --methods paper ours

Budgets are named by the paper's exact tokens: at budget 512 every method may read as many bytes
as the paper's bf16 index at 1/16 and 512 tokens.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from benchmarks.fidelity.calibrate import fit_adaptive
from benchmarks.fidelity.capture import Capture, capture
from benchmarks.fidelity.catalog import methods, ours
from benchmarks.fidelity.checkpoint import load_model
from benchmarks.fidelity.index_store import IndexStore
from benchmarks.fidelity.methods.base import Method
from benchmarks.fidelity.methods.features import Calibration
from benchmarks.fidelity.metrics import attention_errors, teacher_forced
from benchmarks.versions import commit_of_rows

COLUMNS = [
    "commit",
    "model",
    "torch",
    "transformers",
    "device",
    "tokens",
    "decoded",
    "seed",
    "stride",
    "split",
    "kind",
    "name",
    "greedy",
    "method",
    "budget",
    "error_mean",
    "error_median",
    "error_p95",
    "error_worst_layer",
    "worst_layer",
    "mass_mean",
    "exact_tokens_mean",
    "bytes_mean",
    "kl_mean",
    "kl_sem",
    "kl_median",
    "kl_p99",
    "kl_max",
    "top1",
    "first_divergence",
    "kl_tokens_mean",
    "seconds",
]


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


def versions(model: torch.nn.Module, path: str, commit: str) -> dict[str, str]:
    """What a row must say so that it can be repeated."""
    cuda = model.device.type == "cuda"
    return {
        "commit": commit_of_rows(commit),
        "model": Path(path).stem,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def sweep_text(
    model, text: Capture, chosen: list[Method], budgets: list[int], what: list[str], stride: int
) -> Iterator[dict]:
    """Rows of all methods and budgets on one captured text."""
    shared: dict = {}
    whole = IndexStore(text, len(text.token_ids), shared)
    prefix = IndexStore(text, text.prefix_len, shared)
    heads_at_once = 45 if text.keys.is_cuda else 15
    for method in chosen:
        for budget in budgets:
            started = time.perf_counter()
            row = {"method": method.name, "budget": budget}
            if "attention" in what:
                errors = attention_errors(text, method, budget, whole, heads_at_once, stride)
                row |= attention_row(errors, text.num_kv_heads)
            if "kl" in what:
                row |= divergence_row(teacher_forced(model, text, method, budget, prefix))
            row["seconds"] = round(time.perf_counter() - started, 3)
            yield row
        # of the clusterings, only the default one is of use to the methods that follow
        for place in [p for p in shared if p[0] != ours().clusterer.key]:
            del shared[place]


def run_text(
    model, text: dict, args: argparse.Namespace, calibration_ids: list[int] | None
) -> None:
    """All methods on one text; rows go to the CSV as they come."""
    started = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model.to(args.device)
    if calibration_ids is None:
        chosen = methods(args.methods)
    else:
        source = capture(model, calibration_ids[: args.tokens], args.decoded)
        chosen = methods(args.methods, Calibration.of_capture(source))
        for name in args.adaptive:
            chosen += fit_adaptive(source, methods([name])[0], args.budgets[-1])
        del source
    tokens = text["token_ids"][: args.tokens]
    dense = capture(model, tokens, args.decoded)
    label = {"seed": text["seed"], "stride": args.stride if "attention" in args.what else ""}
    label |= {key: text[key] for key in ("split", "kind", "name")}
    label |= {"greedy": text.get("greedy", False)}
    common = versions(model, args.model, args.commit) | label
    common |= {"tokens": len(tokens), "decoded": args.decoded}
    for row in sweep_text(model, dense, chosen, args.budgets, args.what, args.stride):
        write_row(args.out, COLUMNS, common | row)
        numbers = (f"{k}={v:.4g}" for k, v in row.items() if isinstance(v, float))
        print(text["name"], row["method"], row["budget"], *numbers, flush=True)
        if time.perf_counter() - started > args.seconds:
            print(f"out of time in {text['name']}")
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--names", nargs="*", help="texts to run, all of the split if left out")
    parser.add_argument("--methods", nargs="*", help="all of the catalog if left out")
    parser.add_argument("--adaptive", nargs="*", default=[], help="methods to fit budgets for")
    parser.add_argument("--budgets", nargs="*", type=int, default=[128, 512])
    parser.add_argument("--what", nargs="*", default=["attention", "kl"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--decoded", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=4, help="of positions for attention errors")
    parser.add_argument("--layers", type=int, help="keep the model's first layers only")
    parser.add_argument(
        "--calibrate-on", default="argparse", help="a text of the dev split; empty to skip"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default="", help="where there is no git repository")
    parser.add_argument("--processes", type=int, default=1, help="texts at a time, on one device")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop a text after these")
    args = parser.parse_args()

    torch.set_num_threads(torch.get_num_threads() if args.processes == 1 else 1)
    model = load_model(args.model, num_layers=args.layers)
    texts = json.loads(args.texts.read_text())
    by_name = {t["name"]: t["token_ids"] for t in texts}
    calibration = by_name[args.calibrate_on] if args.calibrate_on else None
    jobs = [
        (model, t, args, calibration)
        for t in texts
        if t["split"] == args.split and (not args.names or t["name"] in args.names)
    ]
    if args.processes == 1:
        for job in jobs:
            run_text(*job)
        return
    # forked before the device is touched: the model is loaded once
    context = multiprocessing.get_context("fork")
    running = []
    for job in jobs:
        while len(running) >= args.processes:
            running = [p for p in running if p.is_alive()]
            time.sleep(0.1)
        running.append(context.Process(target=run_text, args=job))
        running[-1].start()
    for process in running:
        process.join()


def write_row(path: Path, columns: list[str], row: dict) -> None:
    """Append a row to a CSV, with the names of the columns before the first one.

    Several processes may write to one file.
    """
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
