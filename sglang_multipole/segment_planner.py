"""The host's side of the cluster pool: which segments to build, in which places.

The host never sees KV slots. Before a decode step it names build orders from token counts alone;
after the step it reads what the device did with them (feedback), always at the same point: when
SGLang processes the step's result. Tensor-parallel ranks therefore decide alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sglang_multipole.config import MultipoleConfig
from sglang_multipole.early_builds import EarlyBuilds
from sglang_multipole.segment_builder import BuildOrder

SWITCHED_OFF = 2**31 - 1  # the token budget of a request that asks for exact attention


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One row of a decode batch: request id, row of req_to_token, length with the new token.

    row_generation: times the row was handed out. A request that loses its slots and comes back in
    the same row (SGLang can retract all requests at once) is known by it.
    """

    rid: str
    row: int
    seq_len: int
    token_budget: int
    row_generation: int = 0

    @property
    def is_switched_off(self) -> bool:
        return self.token_budget == SWITCHED_OFF


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the device does before a decode step: kills, then builds, then slices, in order.

    order_rids names the request of each order. epoch tells plans made before a clear(). starved
    are the requests for which the pool had no place. is_sparse: a row may have clusters; if none
    may, the step is SGLang's dense attention. is_oversized: the batch exceeds BatchLimits. slices:
    orders of later steps, and how many slices of each are done now; cancelled: of those, the ones
    that are given up before anything else is done.
    """

    step: int
    epoch: int
    rows: Sequence[DecodeRow]
    kills: Sequence[int]
    orders: Sequence[BuildOrder]
    order_rids: Sequence[str]
    starved: frozenset[str] = frozenset()
    is_sparse: bool = True
    is_oversized: bool = False
    slices: Sequence[tuple[BuildOrder, int]] = ()
    cancelled: Sequence[BuildOrder] = ()


@dataclasses.dataclass(frozen=True)
class StepFeedback:
    """What the device did in a sparse step.

    built: for each order, whether its place was used. found: [rows, segments] tokens under usable
    clusters. last_used: [places] step of the last use.
    """

    built: Sequence[bool]
    found: np.ndarray
    last_used: np.ndarray


@dataclasses.dataclass(frozen=True)
class BatchLimits:
    """The largest batch that is attended with clusters: its rows, and their tokens in sum."""

    rows: int = 2**31 - 1
    tokens: int = 2**31 - 1

    def admit(self, rows: Sequence[DecodeRow]) -> bool:
        return len(rows) <= self.rows and sum(row.seq_len for row in rows) <= self.tokens


@dataclasses.dataclass
class _Request:
    row: int
    row_generation: int
    num_steps: int = 0
    ordered: int = 0  # tokens from the start that were ordered at least once
    missing: set[int] = dataclasses.field(default_factory=set)  # segments to order (again)
    open_place: int = 0
    segments_built: int = 0
    segments_shared: int = 0
    is_activated: bool = False

    @property
    def is_admission(self) -> bool:
        return self.num_steps <= _NUM_ADMISSION_STEPS


@dataclasses.dataclass
class PlannerStats:
    """Totals since start. open_builds counts clusterings of open segments.

    early_builds: of open and sealed segments, those that were begun before they were wanted.
    """

    segments_built: int = 0
    segments_shared: int = 0
    segments_evicted: int = 0
    open_builds: int = 0
    early_builds: int = 0
    orders_without_place: int = 0


# a request's steps in which all its segments are ordered: SGLang may rewrite the row's slots after
# the first, when another request has put the same prefix into the radix cache meanwhile
_NUM_ADMISSION_STEPS = 2


class SegmentPlanner:
    """Owns the places. A place is free, in an unanswered order, sealed, or one request's: of its
    open segment, or of a clustering that is not wanted yet.

    Args:
        feedback_lag: steps between a plan and its feedback; a place that was used within so many
            steps may be in use by a row the host has not heard of, and is not evicted.
        limits: of a batch; a larger one has no clusters.
        num_slices: of a clustering, see EarlyBuilds.
    """

    def __init__(
        self,
        config: MultipoleConfig,
        num_places: int,
        feedback_lag: int = 2,
        limits: BatchLimits | None = None,
        num_slices: int = 1,
    ):
        self.config, self.num_places, self.feedback_lag = config, num_places, feedback_lag
        self.limits = limits or BatchLimits()
        self._num_slices = num_slices
        self.stats = PlannerStats()
        self.step = 0
        self.epoch = 0
        self.clear()

    def clear(self) -> None:
        """The pool was cleared: all places are free; feedback of earlier steps is dropped."""
        self.epoch += 1
        self.requests: dict[str, _Request] = {}
        self.early = EarlyBuilds(self._num_slices)
        self.free = list(range(self.num_places - 1, 0, -1))
        self.in_order: set[int] = set()
        self.sealed: dict[int, int] = {}  # place -> step in which it was built
        self._last_used = np.zeros(self.num_places, np.int64)  # of the latest feedback
        self._kills: list[int] = []
        self._full_at_step = 0  # nothing can be evicted any more before the next step

    def plan(self, rows: Sequence[DecodeRow]) -> StepPlan:
        """Orders of the next decode step. A request that is not among the rows is gone."""
        self.step += 1
        present = {row.rid for row in rows if self.request_of(row) is not None}
        for rid in [rid for rid in self.requests if rid not in present]:
            self._release(rid)
        strict = self.config.strict_activation
        limit = self.num_places if strict else self.config.max_builds_per_step
        orders: list[BuildOrder] = []
        order_rids: list[str] = []
        starved: set[str] = set()
        is_oversized = not self.limits.admit(rows)
        is_sparse = False
        num_begun = 0  # orders that this step does from the beginning
        for row in rows:
            request = self.requests.setdefault(row.rid, _Request(row.row, row.row_generation))
            request.num_steps += 1
            num_clustered = self.num_clustered(row, len(rows))
            if is_oversized or not num_clustered:
                continue
            is_sparse = True
            for segment, extent in self._wanted(num_clustered, request):
                early = self.early.claim(row.rid, segment, extent)
                if early is not None:
                    self.stats.early_builds += 1
                elif num_begun >= limit:
                    continue
                # a request's first orders are mostly of segments that are there already; only what
                # the feedback has missed is worth another's place, unless the step must be sparse
                may_be_shared = extent == self.config.segment_size and request.is_admission
                place = early.place if early else self._place_again(request, segment, extent)
                if not place:
                    place = self._take_place(strict or not may_be_shared)
                if not place:
                    place = self._own_place(request, segment, extent)
                if not place:
                    starved.add(row.rid)
                    continue
                num_begun += early is None
                orders.append(early or BuildOrder(row.row, segment, extent, place))
                order_rids.append(row.rid)
                self._note_order(request, orders[-1])
            self._expect_next(row, request, num_clustered)
        slices = self.early.slices(self.step, self._take_place_early) if is_sparse else []
        kills, self._kills = self._kills, []
        return StepPlan(
            self.step,
            self.epoch,
            list(rows),
            kills,
            orders,
            order_rids,
            frozenset(starved),
            is_sparse,
            is_oversized,
            slices,
            self.early.take_cancelled(),
        )

    def num_clustered(self, row: DecodeRow, num_rows: int) -> int:
        """Tokens of the row that clusters may stand for in a batch of num_rows; 0 if it is exact.

        Known from token counts alone: below the gate, or under a budget that covers them all, a
        row has no clusters.
        """
        clustered = self.config.clustered_tokens(row.seq_len, num_rows)
        return clustered if clustered > row.token_budget else 0

    def request_of(self, row: DecodeRow) -> _Request | None:
        """What is kept of the row's request; None when the request is gone or was retracted."""
        request = self.requests.get(row.rid)
        if request is None or request.row != row.row:
            return None
        return request if request.row_generation == row.row_generation else None

    def _wanted(self, clustered: int, request: _Request) -> list[tuple[int, int]]:
        """(segment, extent) to order for a row with so many clustered tokens, by position."""
        size = self.config.segment_size
        num_sealed, open_extent = divmod(clustered, size)
        first = 0 if request.is_admission else request.ordered // size
        request.missing.update(range(first, num_sealed))
        # what was never ordered first: the second order of an admission is mostly for nothing, and
        # must not use up a step's builds
        by_need = sorted(request.missing, key=lambda k: (k * size < request.ordered, k))
        wanted = [(k, size) for k in by_need if k < num_sealed]
        if open_extent and (
            request.is_admission or clustered > request.ordered or num_sealed in request.missing
        ):
            wanted.append((num_sealed, open_extent))
        return wanted

    def _expect_next(self, row: DecodeRow, request: _Request, num_clustered: int) -> None:
        """Let the row's next clustering begin, once all its tokens are in the KV pool.

        The pool has what the steps before have written: all tokens but the row's last.
        """
        interval, size = self.config.recluster_interval, self.config.segment_size
        end = num_clustered + interval
        if request.is_admission or request.ordered != num_clustered or end >= row.seq_len:
            return
        segment = (end - 1) // size
        due_step = self.step + end + interval - row.seq_len
        self._free(self.early.expect(row.rid, row.row, segment, end - segment * size, due_step))

    def _place_again(self, request: _Request, segment: int, extent: int) -> int:
        """The place of the request's open segment if it is of just these tokens, or 0.

        The device builds it anew only if it does not hold them any more.
        """
        if segment * self.config.segment_size + extent != request.ordered:
            return 0
        place, request.open_place = request.open_place, 0
        return place

    def _own_place(self, request: _Request, segment: int, extent: int) -> int:
        """The place of the request's open segment, if these tokens replace or seal it; or 0.

        In a full pool an open segment is clustered anew where it lies.
        """
        if segment * self.config.segment_size + extent < request.ordered:
            return 0
        place, request.open_place = request.open_place, 0
        return place

    def _note_order(self, request: _Request, order: BuildOrder) -> None:
        size = self.config.segment_size
        end = order.segment * size + order.extent
        if end >= request.ordered:
            # this order replaces or seals the open segment; the device works in order, so the old
            # place can be given out again at once
            self._free(request.open_place)
            request.open_place = 0
        request.missing.discard(order.segment)
        request.ordered = max(request.ordered, end)
        if order.extent == size:
            self.in_order.add(order.place)
        else:
            request.open_place = order.place

    def _release(self, rid: str) -> None:
        request = self.requests.pop(rid)
        self._free(request.open_place)
        self._free(self.early.drop(rid))

    def _free(self, place: int) -> None:
        """Give a place back, 0 for none; what the device has launched for it comes first."""
        if place:
            self.free.append(place)

    def _take_place(self, may_evict: bool) -> int:
        """A free place, or 0."""
        if not self.free:
            # what is wanted now goes before what will be
            self._free(self.early.drop_latest())
        if not self.free and may_evict:
            self._evict()
        if self.free:
            return self.free.pop()
        self.stats.orders_without_place += may_evict
        return 0

    def _take_place_early(self) -> int:
        """A free place for what is not wanted yet, or 0."""
        if not self.free:
            self._evict()
        return self.free.pop() if self.free else 0

    def _evict(self) -> None:
        """Free the least recently used eighth of the sealed places, none of them in use."""
        if self._full_at_step == self.step:
            return
        last_used = {p: max(built, self._last_used[p]) for p, built in self.sealed.items()}
        unused = [p for p, used in last_used.items() if self.step - used > self.feedback_lag]
        unused.sort(key=last_used.__getitem__)
        for place in unused[: max(1, len(self.sealed) // 8)]:
            del self.sealed[place]
            self._kills.append(place)
            self.free.append(place)
            self.stats.segments_evicted += 1
        if not unused:
            self._full_at_step = self.step

    def apply_feedback(self, plan: StepPlan, feedback: StepFeedback) -> None:
        """Take in what became of a sparse plan."""
        if plan.epoch != self.epoch:
            return
        requests = {row.rid: self.request_of(row) for row in plan.rows}
        for order, rid, built in zip(plan.orders, plan.order_rids, feedback.built, strict=True):
            self._take_in_order(order, requests[rid], built, plan.step)
        self._last_used = feedback.last_used
        clustered = np.array([self.num_clustered(row, len(plan.rows)) for row in plan.rows])
        num_segments = -(-clustered // self.config.segment_size)
        is_wanted = np.arange(feedback.found.shape[1]) < num_segments[:, None]
        lacks = (is_wanted & (feedback.found == 0)).any(1)
        for index, row in enumerate(plan.rows):
            request = requests[row.rid]
            # nothing is news of a row whose segments were all there before and are now
            if request is None or not num_segments[index]:
                continue
            if lacks[index] or request.missing or not request.is_activated:
                found = feedback.found[index, : num_segments[index]]
                self._take_in_found(request, int(clustered[index]), found)

    def _take_in_order(
        self, order: BuildOrder, request: _Request | None, built: bool, step: int
    ) -> None:
        if order.extent < self.config.segment_size:
            self.stats.open_builds += built
            return
        self.in_order.discard(order.place)
        if not built:
            self.free.append(order.place)
            return
        self.sealed[order.place] = step
        self.stats.segments_built += 1
        if request is not None:
            request.segments_built += 1

    def _take_in_found(self, request: _Request, clustered: int, found: np.ndarray) -> None:
        """found: tokens under usable clusters, of each segment the row should have."""
        request.missing -= set(np.flatnonzero(found).tolist())
        request.missing |= set(np.flatnonzero(found == 0).tolist())
        if not request.is_activated:
            request.is_activated = True
            num_sealed = clustered // self.config.segment_size
            num_found = int((found[:num_sealed] == self.config.segment_size).sum())
            request.segments_shared = max(num_found - request.segments_built, 0)
            self.stats.segments_shared += request.segments_shared

    def check_integrity(self) -> None:
        """Every place is counted exactly once.

        Raises:
            RuntimeError: a place is lost or has two owners.
        """
        opened = [r.open_place for r in self.requests.values() if r.open_place]
        owned = [*self.free, *self.sealed, *self.in_order, *opened, *self.early.places]
        if sorted(owned) != list(range(1, self.num_places)):
            raise RuntimeError(
                f"SegmentPlanner: free({len(self.free)}) + sealed({len(self.sealed)}) + "
                f"ordered({len(self.in_order)}) + open({len(opened)}) + "
                f"early({len(self.early.places)}) != "
                f"places({self.num_places - 1}), or one has two owners"
            )
