"""What an audited decode step costs beside one that is not, in one layer.

    python -m benchmarks.audit_cost --csv out.csv                  # PyTorch, on the CPU
    python -m benchmarks.audit_cost --csv out.csv --device cuda    # the kernels, on a GPU

An audit is one row of one layer, whatever the batch and the model's depth. Each line has the time
of that layer's attention for the whole batch, of keeping what the audit needs (in every step), and
of the audit itself (in one of audit_interval steps): on the device, and of the host that launches
it. Medians over repeats; the last column is what auditing every 64th step adds to the attention of
36 layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.csv_file import write_rows
from benchmarks.versions import versions
from sglang_multipole import attach
from sglang_multipole.cluster_pool import ClusterPool, PoolShape
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.segment_builder import BuildOrder, SegmentBuilder
from sglang_multipole.segment_planner import DecodeRow, StepPlan
from sglang_multipole.torch_clustering import TorchClustering
from sglang_multipole.torch_path import TorchPath

HEADS, GROUP, DIM, ROPE_BASE = 8, 4, 128, 1e6  # Qwen3-8B's
NUM_LAYERS = 36
INTERVAL = 64
CONFIG = MultipoleConfig(token_budget=1024, min_context=0, audit_interval=1).for_model(ROPE_BASE)
POINTS = {"cpu": ((4096, 1), (16384, 1)), "cuda": ((8192, 16), (32768, 16), (131072, 4))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(POINTS), default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--commit", default="", help="where there is no git repository")
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for context, batch in POINTS[arguments.device]:
        row = measure(arguments.device, context, batch, arguments.repeats)
        rows.append(row | versions(arguments.commit))
        print(rows[-1], flush=True)
    write_rows(arguments.csv, rows)
    return 0


@torch.inference_mode()
def measure(device: str, context: int, batch: int, repeats: int) -> dict[str, Any]:
    """One row; checks that the audited output is near the dense one."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(1)
    num_slots = batch * context + 1
    # a few directions with noise: keys that cluster
    centers = torch.randn(256, HEADS, DIM, device=device)
    keys = centers[torch.randint(256, (num_slots,), device=device)]
    keys = (keys + 0.5 * torch.randn_like(keys)).to(dtype)
    layer = KVLayer(keys, torch.randn_like(keys), None, None)
    slots = torch.randperm(num_slots - 1, device=device).int().view(batch, context) + 1
    # row 0 is padding
    req_to_token = torch.nn.functional.pad(slots, (0, 0, 1, 0))
    num_places = batch * (-(-context // CONFIG.segment_size) + 1) + 1
    shape = PoolShape(1, HEADS, DIM, num_slots, batch + 1, dtype, device)
    pool = ClusterPool(CONFIG, shape, num_places)
    build(pool, layer, req_to_token, context)
    path = make_path(device, pool, layer, req_to_token, context)
    plain_path = make_path(device, pool, layer, req_to_token, context, is_audited=False)
    audit = attach.make_audit(CONFIG, [layer], req_to_token)
    rows = [DecodeRow(str(i), i, context, CONFIG.token_budget) for i in range(1, batch + 1)]
    plan = StepPlan(1, 1, rows, [], [], [])
    row_numbers = torch.arange(1, batch + 1, device=device)
    lengths, budgets = torch.full_like(row_numbers, context), [CONFIG.token_budget] * batch
    for each in (path, plain_path):
        each.begin(row_numbers, lengths, budgets, 1)
    # near one of the row's keys: attention that looks something up
    q = keys[slots[:, context // 3].long()].repeat_interleave(GROUP, dim=1)
    q = q + 0.3 * torch.randn_like(q)
    out = torch.empty_like(q)

    def attend() -> None:
        path.attend(0, q, DIM**-0.5, out)

    def attend_plainly() -> None:
        plain_path.attend(0, q, DIM**-0.5, out)

    def run_audit() -> None:
        audit.begin(plan)
        numbers.append(audit.end(plan, path.audited(audit.index, context)).numbers)

    numbers: list[torch.Tensor] = []
    times = timed({"kept": attend, "audit": run_audit, "plain": attend_plainly}, device, repeats)
    (kept, _), (audited, host), (plain, _) = times.values()
    error, mass = numbers[-1].tolist()
    if not 0 < error < 0.5 or not 0 < mass <= 1:
        raise RuntimeError(f"audit_cost: the audit must be plausible, got {error} and {mass}")
    share = (max(kept - plain, 0) + audited / INTERVAL) / (NUM_LAYERS * plain)
    return {
        "device": device,
        "context": context,
        "batch": batch,
        "attention_us": round(plain, 1),
        "with_copies_us": round(kept, 1),
        "audit_us": round(audited, 1),
        "audit_host_us": round(host, 1),
        "relative_error": round(error, 4),
        "mass_covered": round(mass, 4),
        "added_share": round(share, 5),
    }


def build(pool: ClusterPool, layer: KVLayer, req_to_token: torch.Tensor, context: int) -> None:
    """Cluster all of every row's clustered tokens."""
    size, clustered = CONFIG.segment_size, CONFIG.clustered_tokens(context)
    orders: list[BuildOrder] = []
    for row in range(1, req_to_token.shape[0]):
        for segment in range(-(-clustered // size)):
            extent = min(size, clustered - segment * size)
            orders.append(BuildOrder(row, segment, extent, len(orders) + 1))
    clustering = TorchClustering(pool, [layer], req_to_token)
    SegmentBuilder(pool, clustering, req_to_token).execute(orders)


def make_path(
    device: str,
    pool: ClusterPool,
    layer: KVLayer,
    req_to_token: torch.Tensor,
    context: int,
    is_audited: bool = True,
) -> Any:
    """The server's own path; layer 0 is audited, or none."""
    audit_layer = 0 if is_audited else None
    if device == "cpu":
        return TorchPath(pool, [layer], req_to_token, audit_layer)
    from sglang_multipole.step_buffers import StepBuffers, StepShape
    from sglang_multipole.triton_path import TritonPath

    shape = StepShape(req_to_token.shape[0] - 1, context, pool.shape.num_slots, HEADS, GROUP, DIM)
    buffers = StepBuffers(CONFIG, shape, device, device)
    return TritonPath(pool, [layer], req_to_token, buffers, audit_layer)


def timed(
    calls: dict[str, Callable[[], None]], device: str, repeats: int
) -> dict[str, tuple[float, float]]:
    """Microseconds of each call, on the device and of the host; medians. The calls take turns."""
    for call in calls.values():
        call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(time_once(call, device))
    return {
        name: tuple(statistics.median(column) for column in zip(*pairs, strict=True))
        for name, pairs in times.items()
    }


def time_once(call: Callable[[], None], device: str) -> tuple[float, float]:
    """Microseconds of one call: on the device, and until it returned."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        elapsed = 1e6 * (time.perf_counter() - started)
        return elapsed, elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started = time.perf_counter()
    begin.record()
    call()
    end.record()
    on_host = 1e6 * (time.perf_counter() - started)
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end), on_host


if __name__ == "__main__":
    sys.exit(main())
