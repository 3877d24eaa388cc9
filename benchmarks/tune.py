"""Time each launch of a decode step under candidate configurations, for launch_config.py.

    python -m benchmarks.tune [--shapes 131072x1x1024,...] [--centroids bf16,fp8]

Each launch is timed alone and the three together; a configuration is first checked against the
reference. Prints a table, best first for each shape and launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import torch

from benchmarks.timing import (
    copies_for_cold_l2,
    copy_bandwidth,
    copy_layer,
    read_bandwidth,
    time_graph,
)
from multipole_kernels import reference
from multipole_kernels.cluster_selection import cluster_selection
from multipole_kernels.coarse_attention import coarse_attention
from multipole_kernels.decode_buffers import DecodeWorkspace
from multipole_kernels.decode_plan import plan_chunks
from multipole_kernels.exact_attention import exact_attention
from multipole_kernels.launch_config import launch_config
from multipole_kernels.multipole_decode import multipole_decode
from tests.decode_case import attention_given_selection, make_case, reference_inputs, selected_flags

CENTROIDS = {"bf16": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
CANDIDATES = {
    "coarse": {
        "coarse_num_warps": (4, 8),
        "coarse_num_stages": (2, 3),
        "coarse_resident_blocks": ((2, 3), (1, 2), (3, 4)),
    },
    "select": {"select_threads": (512, 1024)},
    "exact": {"exact_max_registers": (None, 128), "exact_blocks_per_sm": (2, 3, 4, 6)},
}


def with_config(case, overrides, budget_capacity=None):
    """The case with a workspace of another configuration."""
    old = case.workspace
    config = dataclasses.replace(launch_config(case.q.device), **overrides)
    case.workspace = DecodeWorkspace(
        max_rows=old.max_rows,
        max_items=old.max_items,
        max_items_per_row=old.max_items_per_row,
        budget_capacity=budget_capacity or old.budget_capacity,
        num_kv_heads=old.num_kv_heads,
        gqa_group_size=old.gqa_group_size,
        head_dim=old.head_dim,
        clusters_per_segment=old.clusters_per_segment,
        max_cluster_size=old.max_cluster_size,
        device=case.q.device,
        config=config,
    )
    plan_chunks(
        case.plan, case.workspace, len(case.q), case.pool_layer.key_centroids.element_size()
    )
    return case


def stage_calls(layers, out, overrides, budget_capacity=None):
    """The launches of a step by name, each as a list of calls over the layers."""
    case = with_config(layers[0], overrides, budget_capacity)
    workspace = case.workspace
    # a launch timed alone finds the workspace as a whole step leaves it
    multipole_decode(
        case.q, case.k_cache, case.v_cache, case.pool_layer, case.plan, workspace,
        case.sm_scale, case.max_logit_variance, out,
    )  # fmt: skip

    def calls(function):
        return [lambda layer=layer: function(layer) for layer in layers]

    def coarse(case):
        coarse_attention(
            case.q, case.k_cache, case.v_cache, case.pool_layer, case.plan, workspace,
            case.sm_scale, case.max_logit_variance,
        )  # fmt: skip

    def select(case):
        cluster_selection(len(case.q), case.pool_layer, case.plan, workspace)

    def exact(case):
        exact_attention(
            case.q, case.k_cache, case.v_cache, case.pool_layer, case.plan, workspace,
            case.sm_scale, case.max_logit_variance, out,
        )  # fmt: skip

    def step(case):
        multipole_decode(
            case.q, case.k_cache, case.v_cache, case.pool_layer, case.plan, workspace,
            case.sm_scale, case.max_logit_variance, out,
        )  # fmt: skip

    return {
        "all": calls(step),
        "coarse": calls(coarse),
        "select": calls(select),
        "exact": calls(exact),
    }


def relative_error(case, out, nth=0):
    """Error of one row against the float32 reference with the same selection, and how many of the
    selected clusters the reference would have selected otherwise."""
    selected = selected_flags(case, nth)
    truth = attention_given_selection(case, nth, selected)
    _, _, expected = reference.multipole_attention(**reference_inputs(case, nth, torch.float32))
    error = (out[nth].float() - truth).norm() / truth.norm()
    return error.item(), int((selected != expected).sum()), int(expected.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="131072x1x1024,131072x16x1024,8192x16x512")
    parser.add_argument("--centroids", default="bf16,fp8")
    parser.add_argument("--stages", default="coarse,select,exact")
    arguments = parser.parse_args()
    copy, read = copy_bandwidth() / 1e12, read_bandwidth() / 1e12
    print(f"bandwidth: copy {copy:.2f} TB/s, read {read:.2f} TB/s")
    for shape in arguments.shapes.split(","):
        context, batch, budget = (int(number) for number in shape.split("x"))
        for name in arguments.centroids.split(","):
            tune_shape(context, batch, budget, name, arguments.stages.split(","))


def tune_shape(context, batch, budget, centroids, stages):
    case = make_case(
        [context] * batch,
        [budget] * batch,
        num_kv_heads=8,
        head_dim=128,
        centroid_dtype=CENTROIDS[centroids],
        segment_size=2048,
        clusters_per_segment=128,
        recent=200,
    )
    out = torch.full_like(case.q, torch.nan)
    calls = stage_calls([case], out, {})
    calls["all"][0]()
    error, different, selected = relative_error(case, out, batch - 1)
    first = out.clone()
    calls["all"][0]()
    print(
        f"\n{context} x {batch}, budget {budget}, {centroids}: error {error:.1e}, {different} of "
        f"{selected} clusters differ, same bits {bool((first == out).all())}, tokens "
        f"{case.workspace.num_selected_tokens.float().mean().item():.0f}"
    )
    pool_bytes = case.pool_layer.key_centroids.nbytes * 2
    layers = [case]
    layers += [copy_layer(case) for _ in range(copies_for_cold_l2(pool_bytes) - 1)]
    base = stage_calls(layers, out, {})
    for overlap in (True, False):
        base = stage_calls(layers, out, {"overlap_launches": overlap})
        row = {stage: time_graph(calls).p50_us for stage, calls in base.items()}
        print(f"  overlap {overlap}:", " ".join(f"{k} {v:.1f}" for k, v in row.items()))
    for stage in stages:
        results = []
        names = list(CANDIDATES[stage])
        for values in itertools.product(*CANDIDATES[stage].values()):
            overrides = dict(zip(names, values, strict=True))
            try:
                time_us = time_graph(stage_calls(layers, out, overrides)[stage], replays=10).p50_us
            except Exception as error:
                print(f"  {stage} {overrides}: {type(error).__name__}")
                continue
            results.append((time_us, overrides))
        results.sort(key=lambda result: result[0])
        for time_us, overrides in results[:5]:
            print(f"  {stage} {time_us:.1f}: {overrides}")
        print(f"  {stage} {results[-1][0]:.1f}: {results[-1][1]} (worst)", flush=True)


if __name__ == "__main__":
    main()
