"""Tables and plots of the sweeps' CSV files.

    python -m benchmarks.fidelity.report benchmarks/results/fidelity_*.csv --plots docs/images

Every table is per kind of text and budget, against the paper's method on the same texts.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

Rows = list[dict[str, str]]
LABELS = {
    "paper": "paper",
    "quest": "Quest",
    "oracle": "oracle tokens",
    "s1024": "ours, first study: segments of 1024",
    "ours-place-seeds": "ours, seeds by position alone",
    "ours": "ours, as shipped",
}


def read(paths: list[Path]) -> Rows:
    """All rows; of rows of one text, method and budget the first file's."""
    rows: dict[tuple, dict[str, str]] = {}
    for path in paths:
        with path.open() as file:
            for row in csv.DictReader(file):
                key = (row["split"], row["name"], row["greedy"], row["method"], row["budget"])
                rows[key] = row | {k: v for k, v in rows.get(key, {}).items() if v}
    return list(rows.values())


def mean(rows: Rows, column: str) -> float:
    """Mean over texts; NaN where a text has no such number."""
    values = [float(r[column]) if r.get(column) else math.nan for r in rows]
    return sum(values) / len(values) if values else math.nan


def standard_error(rows: Rows, column: str = "kl_sem") -> float:
    """Of the mean over texts, from each text's own standard error."""
    return math.sqrt(sum(float(r[column] or "nan") ** 2 for r in rows)) / max(1, len(rows))


def against_paper(rows: Rows) -> list[str]:
    """Markdown: a line per kind, budget and method."""
    groups = defaultdict(dict)
    for row in rows:
        groups[row["kind"], int(row["budget"]), row["method"]][row["name"]] = row
    lines = [
        "| texts | budget | method | rel. L2, mean | of paper | p95 of paper | KL | of paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (kind, budget, method), by_name in sorted(groups.items()):
        names = sorted(set(by_name) & set(groups.get((kind, budget, "paper"), {})))
        if not names:
            continue
        ours = [by_name[n] for n in names]
        paper = [groups[kind, budget, "paper"][n] for n in names]
        ratio = {c: mean(ours, c) / mean(paper, c) for c in ("error_mean", "error_p95", "kl_mean")}
        lines.append(
            f"| {kind} ({len(names)}) | {budget} | {method} | {mean(ours, 'error_mean'):.4f} | "
            f"{ratio['error_mean']:.2f} | {ratio['error_p95']:.2f} | "
            f"{mean(ours, 'kl_mean'):.4f} ± {standard_error(ours):.4f} | {ratio['kl_mean']:.2f} |"
        )
    return [line.replace("nan", "-") for line in lines]


def plot(rows: Rows, column: str, title: str, path: Path) -> None:
    """One panel per kind of text: the metric against bytes read per head and step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({r["kind"] for r in rows})
    # so that all lines are of the same texts
    complete = "ours"
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.6), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        texts = {r["name"] for r in rows if r["kind"] == kind and r["method"] == complete}
        for i, (method, label) in enumerate(LABELS.items()):
            points = defaultdict(list)
            for r in rows:
                if r["kind"] == kind and r["method"] == method and r["name"] in texts:
                    points[int(r["budget"])].append(r)
            drawn = [
                (mean(part, "bytes_mean") / 1024, mean(part, column))
                for _, part in sorted(points.items())
            ]
            drawn = [p for p in drawn if not math.isnan(sum(p))]
            if drawn:
                axis.plot(*zip(*drawn, strict=True), marker="o", color=f"C{i}", label=label)
        axis.set(title=kind, xlabel="KiB read per KV head and step", yscale="log")
    axes[0][0].set_ylabel(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--plots", type=Path)
    args = parser.parse_args()

    rows = [r for r in read(args.csv) if r["split"] == args.split and r["greedy"] == "False"]
    print("\n".join(against_paper(rows)))
    if args.plots:
        plot(rows, "error_mean", "mean relative L2 error", args.plots / "fidelity_error.png")
        plot(rows, "kl_mean", "KL of the next token (nats)", args.plots / "fidelity_kl.png")


if __name__ == "__main__":
    main()
