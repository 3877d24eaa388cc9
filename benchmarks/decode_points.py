"""What benchmarks.decode_attention measures: sets of points by name, most wanted first."""

from __future__ import annotations

import dataclasses

# which choose the segments: of 4096 and of 2048 tokens
QWEN3_ROPE_BASE, SMOLLM2_ROPE_BASE = 1e6, 1e5
# tokens, or a share of the context
BUDGETS: tuple[int | float, ...] = (128, 512, 1024, 0.05, 0.1)


@dataclasses.dataclass(frozen=True)
class Points:
    """All batches and budgets of one context length, over one pool of rows.

    context in tokens; budgets and fp8_budgets, those measured with float8 centroids too, in tokens
    or shares of the context; weights_batches, those measured with weights between steps too, if
    that is asked for; triton_batches, those at which dense decode in Triton is timed.
    """

    context: int
    batches: tuple[int, ...] = (16, 4, 1)
    budgets: tuple[int | float, ...] = BUDGETS
    num_kv_heads: int = 8
    keys: str = "mixture"
    rope_base: float = QWEN3_ROPE_BASE
    fp8_budgets: tuple[int | float, ...] = ()
    weights_batches: tuple[int, ...] = ()
    triton_batches: tuple[int, ...] = ()

    def budget_tokens(self, centroids: str) -> list[int]:
        budgets = self.fp8_budgets if centroids == "fp8" else self.budgets
        return [budget if budget >= 1 else int(budget * self.context) for budget in budgets]


POINT_SETS: dict[str, list[Points]] = {
    # where there is a target
    "targets": [
        Points(131072, fp8_budgets=(1024,), weights_batches=(1,), triton_batches=(16, 4, 1)),
        Points(32768, budgets=BUDGETS[1:], fp8_budgets=(512,), weights_batches=(1,)),
        Points(8192, budgets=(512, 1024), fp8_budgets=(512,), weights_batches=(1,)),
    ],
    "more": [
        Points(524288, (1,), (512, 1024, 0.05)),
        Points(65536, budgets=(512, 1024, 0.05)),
        Points(2048, budgets=(128, 512)),
    ],
    "four-heads": [
        Points(131072, budgets=(512, 1024, 0.05), num_kv_heads=4),
        Points(32768, budgets=(512, 1024), num_kv_heads=4),
        Points(8192, (16, 1), (512, 1024), num_kv_heads=4),
    ],
    "captured": [
        Points(context, budgets=budgets, keys="captured", rope_base=SMOLLM2_ROPE_BASE)
        for context, budgets in (
            (131072, (512, 1024, 0.05)),
            (32768, (512, 1024)),
            (8192, (512, 1024)),
        )
    ],
    "short-segments": [
        Points(131072, budgets=(1024,), rope_base=SMOLLM2_ROPE_BASE),
        Points(32768, budgets=(512, 1024), rope_base=SMOLLM2_ROPE_BASE),
        Points(8192, budgets=(512,), rope_base=SMOLLM2_ROPE_BASE),
    ],
}
