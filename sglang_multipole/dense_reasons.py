"""Why a row's decode step was dense although the server serves multipole attention."""

from __future__ import annotations

from sglang_multipole.config import MultipoleConfig
from sglang_multipole.segment_planner import DecodeRow, StepPlan

BELOW_GATE = "below_min_context"
SWITCHED_OFF = "switched_off"  # by the request's own settings
BUDGET_COVERS = "budget_covers"
TOO_LARGE = "batch_too_large"  # for the buffers; see memory.py
POOL_FULL = "pool_full"
NOT_BUILT = "not_built_yet"
# a forward that no scheduler iteration planned, as SGLang's warm-ups at start; of no request
NOT_ANNOUNCED = "not_announced"
REASONS = (
    BELOW_GATE,
    SWITCHED_OFF,
    BUDGET_COVERS,
    TOO_LARGE,
    POOL_FULL,
    NOT_BUILT,
    NOT_ANNOUNCED,
)


def dense_reason(row: DecodeRow, plan: StepPlan, config: MultipoleConfig) -> str:
    """The reason for a row that the attention code counted as dense; one of REASONS."""
    num_clustered = config.clustered_tokens(row.seq_len, len(plan.rows))
    if not num_clustered:
        return BELOW_GATE
    if row.is_switched_off:
        return SWITCHED_OFF
    if row.token_budget >= num_clustered:
        return BUDGET_COVERS
    if plan.is_oversized:
        return TOO_LARGE
    return POOL_FULL if row.rid in plan.starved else NOT_BUILT
