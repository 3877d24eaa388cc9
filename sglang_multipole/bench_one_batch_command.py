"""`sglang-multipole bench-one-batch`: SGLang's benchmark of one static batch, with this plugin."""

from __future__ import annotations

HELP = "`sglang.benchmark.one_batch` with this plugin; an error if no step was sparse"


def run(argv: list[str]) -> int:
    """Run the benchmark and return its exit code."""
    # imports SGLang
    from sglang_multipole import one_batch

    return one_batch.main(argv)
