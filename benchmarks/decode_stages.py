"""The launches of a decode step, together and each alone, over several groups of rows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch

from multipole_kernels import reference
from multipole_kernels.cluster_selection import cluster_selection
from multipole_kernels.coarse_attention import coarse_attention
from multipole_kernels.decode_buffers import DecodeWorkspace
from multipole_kernels.decode_plan import plan_chunks
from multipole_kernels.exact_attention import exact_attention
from multipole_kernels.launch_config import launch_config
from tests.decode_case import (
    DecodeCase,
    attention_given_selection,
    reference_inputs,
    selected_flags,
)

# what the selection writes and the exact launch reads
_LISTS = (
    "selected_clusters",
    "selected_slots",
    "num_selected_clusters",
    "num_selected_tokens",
    "num_clustered_tokens",
)


def share_workspace(
    groups: list[DecodeCase], budget_capacity: int, overrides: dict[str, object] | None = None
) -> None:
    """Give the groups one workspace, as a server's layers have; budget_capacity in tokens.

    overrides: fields of the launch configuration.
    """
    first = groups[0]
    old, pool = first.workspace, first.pool_layer
    num_items = [len(row.places) for row in first.rows]
    workspace = DecodeWorkspace(
        max_rows=len(first.rows),
        max_items=sum(num_items),
        max_items_per_row=max(num_items),
        budget_capacity=budget_capacity,
        num_kv_heads=old.num_kv_heads,
        gqa_group_size=old.gqa_group_size,
        head_dim=old.head_dim,
        clusters_per_segment=old.clusters_per_segment,
        max_cluster_size=old.max_cluster_size,
        device=first.q.device,
        config=dataclasses.replace(launch_config(first.q.device), **(overrides or {})),
    )
    # rows of one length have chunks at the same places
    plan_chunks(first.plan, workspace, len(first.rows), pool.key_centroids.element_size())
    for group in groups:
        group.workspace = workspace


def stage_calls(groups: list[DecodeCase], out: torch.Tensor) -> dict[str, list[Callable]]:
    """The step as dispatched ("all") and in three launches ("three"), and each of these alone.

    One call for each group; a launch timed alone finds the lists that a step of the group leaves.
    """

    def coarse(case):
        coarse_attention(
            case.q, case.k_cache, case.v_cache, case.pool_layer, case.plan, case.workspace,
            case.sm_scale, case.max_logit_variance,
        )  # fmt: skip

    def select(case):
        cluster_selection(len(case.q), case.pool_layer, case.plan, case.workspace)

    def exact(case):
        exact_attention(
            case.q, case.k_cache, case.v_cache, case.pool_layer, case.plan, case.workspace,
            case.sm_scale, case.max_logit_variance, out,
        )  # fmt: skip

    selected = []
    for group in groups:
        group.decode(out=out)
        workspace = copy.copy(group.workspace)
        for name in _LISTS:
            setattr(workspace, name, getattr(workspace, name).clone())
        selected.append(dataclasses.replace(group, workspace=workspace))

    def calls(function, cases):
        return [lambda case=case: function(case) for case in cases]

    return {
        "all": calls(lambda case: case.decode(out=out), groups),
        "three": calls(lambda case: (coarse(case), select(case), exact(case)), groups),
        "coarse": calls(coarse, groups),
        "select": calls(select, groups),
        "exact": calls(exact, selected),
    }


def relative_error(case: DecodeCase, out: torch.Tensor, nth: int = 0) -> tuple[float, int, int]:
    """Error of row nth of the last step against the float32 reference with the same selection; how
    many of the selected clusters the reference would have selected otherwise, of how many."""
    selected = selected_flags(case, nth)
    truth = attention_given_selection(case, nth, selected)
    _, _, expected = reference.multipole_attention(**reference_inputs(case, nth, torch.float32))
    error = (out[nth].float() - truth).norm() / truth.norm()
    return error.item(), int((selected != expected).sum()), int(expected.sum())


def selected_sizes(case: DecodeCase, edges: tuple[int, ...]) -> list[int]:
    """How many clusters of up to each edge (tokens; above the last one before it) the last step of
    the case selected, over rows and KV heads."""
    sizes = torch.cat(
        [
            case.pool_layer.cluster_sizes[row.places]
            .transpose(0, 1)
            .flatten(1)[selected_flags(case, nth)]
            for nth, row in enumerate(case.rows)
        ]
    )
    bins = torch.bucketize(sizes.int().contiguous(), torch.tensor(edges, device=sizes.device))
    return torch.bincount(bins, minlength=len(edges)).tolist()
