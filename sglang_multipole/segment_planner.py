"""The host's side of the cluster pool: which segments to build, in which places.

The host never sees KV slots. Before a decode step it names build orders from token counts alone;
after the step it reads what the device did with them (feedback), always at the same point: when
SGLang processes the step's result. Tensor-parallel ranks therefore decide alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sglang_multipole.config import MultipoleConfig
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
    """What the device does before a decode step: kills, then builds, in order.

    order_rids names the request of each order. epoch tells plans made before a clear(). starved
    are the requests for which the pool had no place.
    """

    step: int
    epoch: int
    rows: Sequence[DecodeRow]
    kills: Sequence[int]
    orders: Sequence[BuildOrder]
    order_rids: Sequence[str]
    starved: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class StepFeedback:
    """What the device did.

    built: for each order, whether its place was used. found: [rows][segments] tokens under usable
    clusters. last_used: [places] step of the last use.
    """

    built: Sequence[bool]
    found: Sequence[Sequence[int]]
    last_used: Sequence[int]


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
    """Totals since start. open_builds counts clusterings of open segments."""

    segments_built: int = 0
    segments_shared: int = 0
    segments_evicted: int = 0
    open_builds: int = 0
    orders_without_place: int = 0


# a request's steps in which all its segments are ordered: SGLang may rewrite the row's slots after
# the first, when another request has put the same prefix into the radix cache meanwhile
_NUM_ADMISSION_STEPS = 2


class SegmentPlanner:
    """Owns the places. A place is free, in an unanswered order, sealed, or one request's open.

    Args:
        feedback_lag: steps between a plan and its feedback; a place that was used within so many
            steps may be in use by a row the host has not heard of, and is not evicted.
    """

    def __init__(self, config: MultipoleConfig, num_places: int, feedback_lag: int = 2):
        self.config, self.num_places, self.feedback_lag = config, num_places, feedback_lag
        self.stats = PlannerStats()
        self.step = 0
        self.epoch = 0
        self.clear()

    def clear(self) -> None:
        """The pool was cleared: all places are free; feedback of earlier steps is dropped."""
        self.epoch += 1
        self.requests: dict[str, _Request] = {}
        self.free = list(range(self.num_places - 1, 0, -1))
        self.in_order: set[int] = set()
        self.sealed: dict[int, int] = {}  # place -> step in which it was built
        self._last_used: Sequence[int] = [0] * self.num_places  # of the latest feedback
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
        for row in rows:
            request = self.requests.setdefault(row.rid, _Request(row.row, row.row_generation))
            request.num_steps += 1
            for segment, extent in self._wanted(row, request):
                if len(orders) >= limit:
                    break
                # a request's first orders are mostly of segments that are there already; only what
                # the feedback has missed is worth another's place, unless the step must be sparse
                may_be_shared = extent == self.config.segment_size and request.is_admission
                place = self._take_place(strict or not may_be_shared)
                if not place:
                    starved.add(row.rid)
                else:
                    orders.append(BuildOrder(row.row, segment, extent, place))
                    order_rids.append(row.rid)
                    self._note_order(request, orders[-1])
        kills, self._kills = self._kills, []
        return StepPlan(
            self.step, self.epoch, list(rows), kills, orders, order_rids, frozenset(starved)
        )

    def request_of(self, row: DecodeRow) -> _Request | None:
        """What is kept of the row's request; None when the request is gone or was retracted."""
        request = self.requests.get(row.rid)
        if request is None or request.row != row.row:
            return None
        return request if request.row_generation == row.row_generation else None

    def _wanted(self, row: DecodeRow, request: _Request) -> list[tuple[int, int]]:
        """(segment, extent) to order for the row, in order of position."""
        if row.is_switched_off:
            return []
        size = self.config.segment_size
        clustered = self.config.clustered_tokens(row.seq_len)
        num_sealed, open_extent = divmod(clustered, size)
        first = 0 if request.is_admission else request.ordered // size
        request.missing.update(range(first, num_sealed))
        wanted = [(k, size) for k in sorted(request.missing) if k < num_sealed]
        if open_extent and (
            request.is_admission or clustered > request.ordered or num_sealed in request.missing
        ):
            wanted.append((num_sealed, open_extent))
        return wanted

    def _note_order(self, request: _Request, order: BuildOrder) -> None:
        size = self.config.segment_size
        end = order.segment * size + order.extent
        if end >= request.ordered and request.open_place:
            # this order replaces or seals the open segment; the device works in order, so the old
            # place can be given out again at once
            self.free.append(request.open_place)
            request.open_place = 0
        request.missing.discard(order.segment)
        request.ordered = max(request.ordered, end)
        if order.extent == size:
            self.in_order.add(order.place)
        else:
            request.open_place = order.place

    def _release(self, rid: str) -> None:
        request = self.requests.pop(rid)
        if request.open_place:
            self.free.append(request.open_place)

    def _take_place(self, may_evict: bool) -> int:
        """A free place, or 0."""
        if not self.free and may_evict:
            self._evict()
        if self.free:
            return self.free.pop()
        self.stats.orders_without_place += may_evict
        return 0

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
        """Take in what became of a plan."""
        if plan.epoch != self.epoch:
            return
        requests = {row.rid: self.request_of(row) for row in plan.rows}
        for order, rid, built in zip(plan.orders, plan.order_rids, feedback.built, strict=True):
            self._take_in_order(order, requests[rid], built, plan.step)
        self._last_used = feedback.last_used
        for row, found in zip(plan.rows, feedback.found, strict=True):
            request = self.request_of(row)
            if request is not None:
                self._take_in_found(row, request, found)

    def _take_in_order(
        self, order: BuildOrder, request: _Request | None, built: bool, step: int
    ) -> None:
        if order.extent < self.config.segment_size:
            self.stats.open_builds += 1
            return
        self.in_order.discard(order.place)
        if not built:
            self.free.append(order.place)
            return
        self.sealed[order.place] = step
        self.stats.segments_built += 1
        if request is not None:
            request.segments_built += 1

    def _take_in_found(self, row: DecodeRow, request: _Request, found: Sequence[int]) -> None:
        if row.is_switched_off:
            return
        size = self.config.segment_size
        num_sealed, open_extent = divmod(self.config.clustered_tokens(row.seq_len), size)
        num_segments = num_sealed + bool(open_extent)
        request.missing -= {k for k in range(num_segments) if found[k]}
        request.missing |= {k for k in range(num_segments) if not found[k]}
        if num_segments and not request.is_activated:
            request.is_activated = True
            num_found = sum(found[k] == size for k in range(num_sealed))
            request.segments_shared = max(num_found - request.segments_built, 0)
            self.stats.segments_shared += request.segments_shared

    def check_integrity(self) -> None:
        """Every place is counted exactly once.

        Raises:
            RuntimeError: a place is lost or has two owners.
        """
        opened = [r.open_place for r in self.requests.values() if r.open_place]
        owned = [*self.free, *self.sealed, *self.in_order, *opened]
        if sorted(owned) != list(range(1, self.num_places)):
            raise RuntimeError(
                f"SegmentPlanner: free({len(self.free)}) + sealed({len(self.sealed)}) + "
                f"ordered({len(self.in_order)}) + open({len(opened)}) != "
                f"places({self.num_places - 1}), or one has two owners"
            )
