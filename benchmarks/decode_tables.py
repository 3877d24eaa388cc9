"""Print the tables of docs/kernels.md and README.md from a table of benchmarks.decode_attention.

python -m benchmarks.decode_tables benchmarks/results/decode_attention_h100.csv
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable

CENTROIDS = ("bf16", "int8")
# (context, batch, budget) -> times FlashInfer's speed, by CENTROIDS
TARGETS = {
    (131072, 16, 1024): (12.5, 20.0),
    (131072, 16, 6553): (8.0, None),
    (131072, 16, 13107): (5.5, None),
    (131072, 4, 1024): (11.0, 16.0),
    (131072, 1, 1024): (7.5, 8.5),
    (32768, 16, 512): (10.5, 15.0),
    (32768, 16, 1024): (9.0, 12.0),
    (32768, 1, 1024): (4.0, 4.5),
    (8192, 16, 512): (5.5, 6.5),
    (8192, 1, 512): (2.0, None),
}
# random rows of 256 bytes, benchmarks/results/decode_tuning_h100.csv
GATHER_BYTES_PER_S = 2.87e12


class Results:
    """Rows of the CSV by what they measure."""

    def __init__(self, path: str):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        # all tables but one are of steps that follow each other
        self.rows = [row for row in rows if row.get("between") != "weights"]
        self.with_weights = [row for row in rows if row.get("between") == "weights"]
        self.multipole = [row for row in self.rows if row["provider"] == "multipole"]

    def select(self, **wanted: object) -> list[dict[str, str]]:
        """Rows whose columns have these values, in the CSV's order."""
        return [
            row
            for row in self.rows
            if all(row[name] == str(value) for name, value in wanted.items())
        ]

    def time(self, provider: str, like: dict[str, str]) -> float | None:
        """p50 in us of a dense provider at the point of another row."""
        names = ("keys", "segment_size", "context", "batch", "num_kv_heads")
        found = self.select(provider=provider, **{name: like[name] for name in names})
        return float(found[0]["p50_us"]) if found else None


def markdown(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def budget_name(row: dict[str, str]) -> str:
    """A budget that is a share of the context as such."""
    share = int(row["budget"]) / int(row["context"])
    for percent in (5, 10):
        if abs(share - percent / 100) < 1e-3 and int(row["budget"]) not in (128, 512, 1024):
            return f"{percent} %"
    return row["budget"]


def point_name(row: dict[str, str]) -> str:
    return f"{int(row['context']) // 1024}K x {row['batch']}, {budget_name(row)}"


def number(text: str | float | None, digits: int = 1) -> str:
    return f"{float(text):.{digits}f}" if text not in (None, "") else "-"


def is_headline(row: dict[str, str]) -> bool:
    """Of Qwen3-8B's geometry, with centroids of CENTROIDS."""
    kind = (row["keys"], row["num_kv_heads"])
    return kind == ("mixture", "8") and row["centroids"] in CENTROIDS


def ratio_cells(results: Results, row: dict[str, str], centroids: Iterable[str]) -> list[str]:
    """Time, ratio to FlashInfer and target for each kind of centroids at the row's point."""
    names = ("keys", "segment_size", "context", "batch", "num_kv_heads", "budget")
    cells = []
    for nth, name in enumerate(centroids):
        found = results.select(centroids=name, **{column: row[column] for column in names})
        point = (int(row["context"]), int(row["batch"]), int(row["budget"]))
        target = TARGETS.get(point, (None, None))[nth] if is_headline(row) else None
        if not found:
            cells += ["-", "-", "-"]
            continue
        ratio = float(found[0]["ratio_to_flashinfer"])
        reached = target is not None and ratio >= target
        shown = f"**{ratio:.1f}x**" if reached else f"{ratio:.1f}x"
        wanted = "-" if target is None else f"{target:g}x"
        cells += [number(found[0]["p50_us"]), shown, wanted]
    return cells


def ratio_table(results: Results, keys: str, num_kv_heads: int, segment_size: int) -> str:
    """All points of one kind against dense decode."""
    points = results.select(
        provider="multipole",
        keys=keys,
        num_kv_heads=num_kv_heads,
        segment_size=segment_size,
        centroids="int8",
    )
    head = ["context x batch, budget", "FlashInfer", "SGLang Triton"]
    for name in CENTROIDS:
        head += [name, "ratio", "target"]
    body = [
        [
            point_name(row),
            number(results.time("flashinfer", row)),
            number(results.time("sglang-triton", row), 0),
            *ratio_cells(results, row, CENTROIDS),
        ]
        for row in points
    ]
    return markdown(head, body)


def stage_table(results: Results, budgets: tuple[int, ...] = (512, 1024)) -> str:
    """Each launch alone, with the time that its bytes take."""
    head = ["", "coarse", "selection", "exact", "FlashInfer, selected", "sum", "step", "of copy"]
    body = []
    for row in results.multipole:
        if not is_headline(row) or int(row["budget"]) not in budgets:
            continue
        batch_heads = int(row["batch"]) * int(row["num_kv_heads"])
        exact_bytes = float(row["mean_selected_tokens"]) * batch_heads * 512
        coarse_floor = (float(row["bytes"]) - exact_bytes) / float(row["read_bytes_per_s"]) * 1e6
        exact_floor = exact_bytes / GATHER_BYTES_PER_S * 1e6
        body.append(
            [
                f"{point_name(row)}, {row['centroids']}",
                f"{number(row['coarse_us'])} ({coarse_floor:.1f})",
                number(row["select_us"]),
                f"{number(row['exact_us'])} ({exact_floor:.1f})",
                number(row.get("exact_flashinfer_us")),
                number(row["sum_of_launches_us"]),
                number(row["p50_us"]),
                f"{float(row['share_of_copy']):.0%}",
            ]
        )
    return markdown(head, body)


def claim_table(results: Results, segment_size: int) -> str:
    """The paper's measure: the sum of the kernels at 95 % and 90 % sparsity over dense decode."""
    head = ["128K x batch, budget", "dense Triton", "FlashInfer"]
    for name in CENTROIDS:
        head += [f"sum, {name}", "over Triton", "over FlashInfer"]
    body = []
    wanted = {"context": 131072, "keys": "mixture", "num_kv_heads": 8, "segment_size": segment_size}
    for row in results.select(provider="multipole", centroids="int8", **wanted):
        if not budget_name(row).endswith("%"):
            continue
        times = [results.time(provider, row) for provider in ("sglang-triton", "triton-dense")]
        dense = [min((time for time in times if time is not None), default=None)]
        dense.append(results.time("flashinfer", row))
        cells = []
        for name in CENTROIDS:
            point = {"batch": row["batch"], "budget": row["budget"], "centroids": name}
            total = float(results.select(**wanted, **point)[0]["sum_of_launches_us"])
            cells.append(number(total))
            cells += ["-" if time is None else f"{time / total:.1f}x" for time in dense]
        body.append([point_name(row), *(number(time) for time in dense), *cells])
    return markdown(head, body)


def fp8_table(results: Results) -> str:
    head = ["context x batch, budget", "fp8", "ratio", "int8", "ratio"]
    body = []
    for row in results.select(provider="multipole", centroids="fp8"):
        fp8, int8 = (ratio_cells(results, row, [name])[:2] for name in ("fp8", "int8"))
        body.append([point_name(row), *fp8, *(cell.strip("*") for cell in int8)])
    return markdown(head, body)


def weights_table(results: Results) -> str:
    """Steps with a layer's weights read between them, beside those that follow each other."""
    head = ["context x batch, budget", "FlashInfer", "back to back"]
    for name in CENTROIDS:
        head += [name, "ratio", "back to back", "ratio"]
    names = ("keys", "segment_size", "context", "batch", "num_kv_heads", "budget")
    body = []
    for row in results.with_weights:
        if row["provider"] != "multipole" or row["centroids"] != CENTROIDS[-1]:
            continue
        dense = float(row["p50_us"]) * float(row["ratio_to_flashinfer"])
        line = [point_name(row), number(dense), number(results.time("flashinfer", row))]
        for name in CENTROIDS:
            for rows in (results.with_weights, results.multipole):
                found = [
                    other
                    for other in rows
                    if other["centroids"] == name and all(other[n] == row[n] for n in names)
                ]
                ratio = found[0]["ratio_to_flashinfer"] if found else None
                line += [number(found[0]["p50_us"]) if found else "-", f"{number(ratio)}x"]
        body.append(line)
    return markdown(head, body)


def readme_table(results: Results, budget: int = 512) -> str:
    """Ratios with int8 centroids; of segments of 2048 where 4096 are not measured."""
    head = ["context", "batch 1", "batch 4", "batch 16"]
    wanted = {"provider": "multipole", "keys": "mixture", "num_kv_heads": 8, "centroids": "int8"}
    body = []
    for context in (2048, 8192, 32768, 65536, 131072, 524288):
        cells = []
        for batch in (1, 4, 16):
            found = results.select(**wanted, context=context, batch=batch, budget=budget)
            found.sort(key=lambda row: -int(row["segment_size"]))
            ratio = float(found[0]["ratio_to_flashinfer"]) if found else None
            cells.append("" if ratio is None else f"{ratio:.1f}x")
        if any(cells):
            body.append([f"{context // 1024}K", *cells])
    return markdown(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv")
    results = Results(parser.parse_args().csv)
    first = results.rows[0]
    copy, read = (float(first[f"{kind}_bytes_per_s"]) / 1e12 for kind in ("copy", "read"))
    print(f"{first['gpu']}, commit {first['commit']}: copy {copy:.2f} TB/s, read {read:.2f} TB/s\n")
    errors = [float(row["relative_error"]) for row in results.multipole]
    different = sum(int(row["clusters_selected_differently"]) for row in results.multipole)
    print(
        f"{len(errors)} points, errors {min(errors):.1e} to {max(errors):.1e}, {different} differ\n"
    )
    for kind in (
        ("mixture", 8, 4096),
        ("mixture", 8, 2048),
        ("captured", 8, 2048),
        ("mixture", 4, 4096),
    ):
        print("{}, {} KV heads, segments of {}\n".format(*kind))
        print(ratio_table(results, *kind))
    print(stage_table(results))
    for segment_size in (4096, 2048):
        print(claim_table(results, segment_size))
    print(fp8_table(results))
    print(weights_table(results))
    print(readme_table(results))


if __name__ == "__main__":
    main()
