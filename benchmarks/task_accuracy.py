"""The tasks of `sglang-multipole eval` on a dense server, on its multipole twin, and a CSV of both.

    python -m benchmarks.task_accuracy OUT_FOLDER --dense http://127.0.0.1:30000 \
        --multipole http://127.0.0.1:30001 --lengths 2048 4096 8000

The servers may also run one after the other: a call with --dense alone keeps its results in the
folder, and a later one with --multipole alone compares with them. Where the dense server is right
in less than half of the samples, accuracy is no evidence, and the KL of decode steps is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.csv_file import write_rows
from benchmarks.versions import versions
from sglang_multipole import cli

TASKS = ("passkey", "niah_single", "niah_multikey_2", "niah_multikey_3", "vt", "fwe")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for dense.json, multipole.json and the CSV")
    parser.add_argument("--dense", help="base URL of the server without multipole attention")
    parser.add_argument("--multipole", help="base URL of its twin with it")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8000])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument(
        "--reference-tokens", type=int, default=16, help="places of KL a dense answer; 0 for none"
    )
    parser.add_argument(
        "--token-budget", type=int, help="of the multipole requests; else the server's"
    )
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--commit", default="", help="where there is no git repository")
    args = parser.parse_args(argv)

    args.folder.mkdir(parents=True, exist_ok=True)
    common = [part for name in args.tasks for part in ("--task", name)]
    common += ["--length", *map(str, args.lengths), "--samples", str(args.samples)]
    common += ["--concurrency", str(args.concurrency)]
    dense, sparse = args.folder / "dense.json", args.folder / "multipole.json"
    reference = args.folder / "answers.json"
    if args.dense:
        keep = ["--save-reference", str(reference)]
        keep += ["--reference-tokens", str(args.reference_tokens)]
        run(args.dense, dense, [*common, *(keep if args.reference_tokens else [])])
    if args.multipole:
        against = ["--baseline", str(dense), "--require-multipole"]
        if args.reference_tokens:
            against += ["--reference", str(reference)]
        if args.token_budget is not None:
            params = {"custom_params": {"multipole": {"token_budget": args.token_budget}}}
            against += ["--extra-body", json.dumps(params)]
        run(args.multipole, sparse, [*common, *against])
        both = [json.loads(path.read_text()) for path in (dense, sparse)]
        rows = table(*both, args.token_budget)
        write_rows(args.folder / "task_accuracy.csv", [r | versions(args.commit) for r in rows])
    else:
        for row in json.loads(dense.read_text())["tasks"]:
            print(row["task"], row["length"], f"{row['accuracy']:.3f}")
    return 0


def run(base_url: str, path: Path, options: list[str]) -> None:
    """One `sglang-multipole eval`.

    Raises:
        RuntimeError: requests failed.
    """
    code = cli.main(["eval", "--base-url", base_url, "--json", str(path), *options])
    if code != 0:
        raise RuntimeError(f"task_accuracy: eval at {base_url} must succeed, got exit code {code}")


def table(
    dense: dict[str, Any], sparse: dict[str, Any], token_budget: int | None
) -> list[dict[str, Any]]:
    """A row a task and length; empty where a number was not measured."""
    of_dense = {(r["task"], r["length"]): r for r in dense["tasks"]}
    divergences = {(r["task"], r["length"]): r for r in sparse["divergence"]}
    activity = sparse["activity"] or {}
    if token_budget is None:
        token_budget = (sparse["multipole_config"] or {}).get("token_budget")
    rows = []
    for row in sparse["tasks"]:
        place = row["task"], row["length"]
        kl = divergences.get(place, {})
        rows.append(
            {
                "model": Path(sparse["model"]).name,
                "task": row["task"],
                "length": row["length"],
                "token_budget": token_budget,
                "samples": row["samples"],
                "dense_accuracy": of_dense[place]["accuracy"],
                "dense_standard_error": of_dense[place]["standard_error"],
                "multipole_accuracy": row["accuracy"],
                "multipole_standard_error": row["standard_error"],
                "difference": row["difference"],
                "difference_standard_error": row["difference_standard_error"],
                "evidence": row["evidence"],
                "kl": kl.get("kl"),
                "kl_standard_error": kl.get("kl_standard_error"),
                "top1_agreement": kl.get("top1_agreement"),
                # of all tasks and lengths together
                "share_read": activity.get("share_read"),
                "sparse_steps": activity.get("sparse_steps"),
                "dense_steps": activity.get("dense_steps"),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
