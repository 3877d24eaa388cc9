"""What a scheduler process says once, in one block of its log, when it is ready."""

from __future__ import annotations

from sglang_multipole import sglang_compat
from sglang_multipole.runtime import MultipoleRuntime

_GIB = 2**30


def startup_summary(runtime: MultipoleRuntime, has_metrics: bool) -> str:
    """The block: configuration, memory, graphs and what operators can see."""
    config, pool, path = runtime.config, runtime.pool, runtime.path
    limits = path.limits
    kv_bytes = sum(kv.key_buffer.nbytes + kv.value_buffer.nbytes for kv in runtime.path.layers)
    share = 100 * pool.nbytes / kv_bytes
    lines = [
        f"Multipole attention {sglang_compat.own_version()} is active",
        f"budget: {config.token_budget} tokens a step and KV head, of a request up to "
        f"{config.token_budget_limit}; exact below {config.min_context_text}",
        f"cluster pool: {pool.nbytes / _GIB:.3f} GiB, {share:.1f} % of the KV pool; "
        f"{pool.num_places - 1} segments of {config.segment_size} tokens, "
        f"{config.clusters_per_segment} clusters each",
    ]
    if path.nbytes:
        lines.append(
            f"decode buffers: {path.nbytes / _GIB:.3f} GiB, for batches of up to {limits.rows} "
            f"requests and {limits.tokens} tokens"
        )
    for kind, usage in runtime.graphs.items():
        lines.append(
            f"{kind} decode graphs: {usage.graphs}, captured in {usage.seconds:.1f} s, "
            f"{usage.bytes / _GIB:.3f} GiB"
        )
    if runtime.audit is not None:
        lines.append(
            f"audit: layer {runtime.audit.layer}, every {config.audit_interval} decode steps"
        )
    seen = ["/server_info", *(["/metrics"] if has_metrics else [])]
    lines.append(
        f"to be seen at: {', '.join([*seen, config.events_endpoint or 'no event stream'])}"
    )
    return "\n  ".join(lines)
