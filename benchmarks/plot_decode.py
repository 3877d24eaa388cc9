"""Plot a table of benchmarks.decode_attention: speed over FlashInfer's dense decode.

python -m benchmarks.plot_decode benchmarks/results/decode_attention_h100.csv docs/images/x.png
"""

from __future__ import annotations

import argparse
import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCHES = (1, 4, 16)


def curve(rows: list[dict], batch: int, centroids: str, budget: int) -> list[tuple[int, float]]:
    """(context in tokens, ratio) of one batch size, rising in context.

    Of segments of 2048 tokens where 4096 are not measured.
    """
    points = [
        (int(row["segment_size"]), int(row["context"]), float(row["ratio_to_flashinfer"]))
        for row in rows
        if row["provider"] == "multipole"
        and row.get("between") != "weights"
        and (row["keys"], row["num_kv_heads"]) == ("mixture", "8")
        and (row["batch"], row["centroids"], row["budget"]) == (str(batch), centroids, str(budget))
    ]
    return sorted({context: ratio for _, context, ratio in sorted(points)}.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv")
    parser.add_argument("image")
    parser.add_argument("--budget", type=int, default=512, help="tokens")
    options = parser.parse_args()
    with open(options.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for nth, batch in enumerate(BATCHES):
        for centroids, style in (("int8", "-o"), ("bf16", "--s")):
            points = curve(rows, batch, centroids, options.budget)
            contexts, ratios = [c / 1024 for c, _ in points], [r for _, r in points]
            label = f"batch {batch}, {centroids} centroids"
            axes.plot(contexts, ratios, style, color=f"C{nth}", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    ticks = [2, 8, 32, 128, 512]
    axes.set_xticks(ticks, [f"{tick}K" for tick in ticks])
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("times FlashInfer's speed")
    axes.set_title(f"{rows[0]['gpu']}, {options.budget} tokens exact", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.image, dpi=150)


if __name__ == "__main__":
    main()
