"""Deliberate faults in the cluster pool: what the model of its life must catch.

Each is one that a change of the code could make, put in by monkeypatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from sglang_multipole import sglang_compat
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.early_builds import EarlyBuilds
from sglang_multipole.runtime import MultipoleRuntime
from sglang_multipole.segment_builder import BuildOrder, SegmentBuilder
from sglang_multipole.segment_planner import DecodeRow, SegmentPlanner


def generation_not_bumped(patch: pytest.MonkeyPatch) -> None:
    """The allocator hands out slots and nobody hears of it."""
    patch.setattr(ClusterPool, "invalidate_slots", lambda pool, slots: None)


def one_slot_not_compared(patch: pytest.MonkeyPatch) -> None:
    """The last of the clustered tokens may lie anywhere."""
    matches = ClusterPool.matches

    def all_but_the_last(
        pool: ClusterPool, places: torch.Tensor, slots: torch.Tensor, extent: torch.Tensor
    ) -> torch.Tensor:
        return (extent > 0) & matches(pool, places, slots, (extent - 1).clamp(min=1))

    patch.setattr(ClusterPool, "matches", all_but_the_last)


def place_reused_one_step_too_early(patch: pytest.MonkeyPatch) -> None:
    """The host gives a place out that the last step, unheard of yet, has used."""
    original = SegmentPlanner.__init__

    def impatient(planner: SegmentPlanner, *args: object, **kwargs: object) -> None:
        original(planner, *args, **kwargs)
        planner.feedback_lag -= 1

    patch.setattr(SegmentPlanner, "__init__", impatient)


def kills_after_builds(patch: pytest.MonkeyPatch) -> None:
    """The same place is killed and built anew in one step, in the wrong order."""
    begin_step = MultipoleRuntime.begin_step

    def swapped(runtime: MultipoleRuntime, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        kills, execute = runtime._plan.kills, runtime.builder.execute
        runtime._plan = dataclasses.replace(runtime._plan, kills=[])

        def execute_then_kill(orders: object) -> list[bool]:
            built = execute(orders)
            if kills:
                runtime.pool.kill(kills)
            return built

        runtime.builder.execute = execute_then_kill
        begin_step(runtime, rows, seq_lens)
        del runtime.builder.execute

    patch.setattr(MultipoleRuntime, "begin_step", swapped)


def open_place_leaked(patch: pytest.MonkeyPatch) -> None:
    """A request that ends keeps the place of its open segment."""
    patch.setattr(SegmentPlanner, "_release", lambda planner, rid: planner.requests.pop(rid))


def open_segment_survives_its_request(patch: pytest.MonkeyPatch) -> None:
    """A row's open segment is taken for the next request's in the row, whatever its slots."""
    matches = ClusterPool.matches

    def open_ones_uncompared(
        pool: ClusterPool, places: torch.Tensor, slots: torch.Tensor, extent: torch.Tensor
    ) -> torch.Tensor:
        is_open = (places > 0) & (extent > 0) & (extent < pool.config.segment_size)
        return matches(pool, places, slots, extent) | is_open

    patch.setattr(ClusterPool, "matches", open_ones_uncompared)


def host_state_survives_its_request(patch: pytest.MonkeyPatch) -> None:
    """The planner takes a request that came back in its row for the one that lost it."""
    decode_rows = sglang_compat.decode_rows

    def without_generation(batch: object, config: object) -> list:
        rows = decode_rows(batch, config)
        return [dataclasses.replace(row, row_generation=0) for row in rows]

    patch.setattr(sglang_compat, "decode_rows", without_generation)


def place_begun_leaked(patch: pytest.MonkeyPatch) -> None:
    """A request that ends keeps the place of its next clustering."""
    patch.setattr(EarlyBuilds, "_cancel", lambda builds, build: 0)


def given_up_clustering_goes_on(patch: pytest.MonkeyPatch) -> None:
    """The device does not hear that a clustering is given up; its order may come again."""
    patch.setattr(EarlyBuilds, "take_cancelled", lambda builds: [])


def half_written_place_found(patch: pytest.MonkeyPatch) -> None:
    """A place that is written over several steps is as findable as it was before."""
    kill, describe = ClusterPool.kill, ClusterPool.describe

    def describe_alone(pool: ClusterPool, places: torch.Tensor, slots: torch.Tensor) -> None:
        patch.setattr(ClusterPool, "kill", lambda *_: None)
        describe(pool, places, slots)
        patch.setattr(ClusterPool, "kill", kill)

    patch.setattr(ClusterPool, "describe", describe_alone)


def begun_one_token_too_early(patch: pytest.MonkeyPatch) -> None:
    """A clustering begins in the step that writes the last of its tokens."""
    expect_next = SegmentPlanner._expect_next

    def with_the_steps_own(
        planner: SegmentPlanner, row: DecodeRow, request: object, num_clustered: int
    ) -> None:
        longer = dataclasses.replace(row, seq_len=row.seq_len + 1)
        expect_next(planner, longer, request, num_clustered)

    patch.setattr(SegmentPlanner, "_expect_next", with_the_steps_own)


def published_as_soon_as_done(patch: pytest.MonkeyPatch) -> None:
    """The longer clustering takes the place of the one that the row still has."""
    advance = SegmentBuilder.advance

    def advance_and_publish(builder: SegmentBuilder, order: BuildOrder, num_slices: int) -> None:
        advance(builder, order, num_slices)
        if not builder._begun[order].num_left:
            rows, segments, extents, places = builder._columns([order])
            slots = builder._slots(rows, segments, order.extent)
            is_sealed = order.extent == builder.pool.config.segment_size
            builder.pool.publish(places, slots, rows, extents, int(is_sealed))

    patch.setattr(SegmentBuilder, "advance", advance_and_publish)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    fault.__name__: fault
    for fault in (
        generation_not_bumped,
        one_slot_not_compared,
        place_reused_one_step_too_early,
        kills_after_builds,
        open_place_leaked,
        open_segment_survives_its_request,
        host_state_survives_its_request,
        place_begun_leaked,
        given_up_clustering_goes_on,
        half_written_place_found,
        begun_one_token_too_early,
        published_as_soon_as_done,
    )
}
