"""Clusterings that are begun before they are wanted, in slices; decided by the host alone.

With I = recluster_interval, a row's clusters reach its first `end` tokens at the step in which it
is end + I tokens long; these tokens lie in the KV pool I - 1 steps before. In those steps the
clustering is done, a few slices a step, and the step that wants it publishes it: the answers are
those of a server in which that step does it all.

A step does none as long as one slice a step will be soon enough, so that little is done for a
request that ends before; and never more than an even share of what is due. What is not done in
time, for want of steps, the step that wants it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sglang_multipole.segment_builder import BuildOrder


@dataclasses.dataclass
class EarlyBuild:
    """A row's next clustering. order: None until its first slice, which needs a place.

    due_step: the step that wants it. is_given_up: there was no place.
    """

    row: int
    segment: int
    extent: int
    due_step: int
    slices_left: int
    order: BuildOrder | None = None
    is_given_up: bool = False


class EarlyBuilds:
    """At most one clustering a request, of num_slices slices each; one is begun at a time."""

    def __init__(self, num_slices: int):
        self._num_slices = num_slices
        self._builds: dict[str, EarlyBuild] = {}
        self._cancelled: list[BuildOrder] = []

    @property
    def places(self) -> list[int]:
        return [build.order.place for build in self._builds.values() if build.order]

    def expect(self, rid: str, row: int, segment: int, extent: int, due_step: int) -> int:
        """The row will want this; returns the place of what it was expected to want, or 0."""
        known = self._builds.get(rid)
        if known is not None and (known.segment, known.extent) == (segment, extent):
            return 0
        place = self.drop(rid)
        self._builds[rid] = EarlyBuild(row, segment, extent, due_step, self._num_slices)
        return place

    def claim(self, rid: str, segment: int, extent: int) -> BuildOrder | None:
        """The order of what is wanted now, if it was begun; its last slices may not be done."""
        build = self._builds.get(rid)
        if build is None or (build.segment, build.extent) != (segment, extent):
            return None
        return self._builds.pop(rid).order

    def drop(self, rid: str) -> int:
        """Forget the request's; returns the place that it held, or 0."""
        build = self._builds.pop(rid, None)
        return self._cancel(build) if build is not None else 0

    def drop_latest(self) -> int:
        """Give up what is due last of all that hold a place; returns the place, or 0."""
        begun = [build for build in self._builds.values() if build.order]
        if not begun:
            return 0
        latest = max(begun, key=lambda build: build.due_step)
        latest.is_given_up = True
        return self._cancel(latest)

    def _cancel(self, build: EarlyBuild) -> int:
        if build.order is None:
            return 0
        order, build.order = build.order, None
        self._cancelled.append(order)
        return order.place

    def take_cancelled(self) -> list[BuildOrder]:
        """Orders that were begun and are given up, since this was asked last."""
        cancelled, self._cancelled = self._cancelled, []
        return cancelled

    def slices(self, step: int, take_place: Callable[[], int]) -> list[tuple[BuildOrder, int]]:
        """What this step does: orders, and how many slices of each.

        Args:
            take_place: a free place, or 0.
        """
        waiting = [b for b in self._builds.values() if b.slices_left and not b.is_given_up]
        # what is begun holds scratch, so it is finished before anything is begun
        waiting.sort(key=lambda build: (build.order is None, build.due_step))
        num_slices, work = _due_now(waiting, step), []
        for build in waiting:
            if not num_slices:
                break
            if build.order is None:
                place = take_place()
                if not place:
                    build.is_given_up = True
                    continue
                build.order = BuildOrder(build.row, build.segment, build.extent, place)
            count = min(num_slices, build.slices_left)
            build.slices_left -= count
            num_slices -= count
            work.append((build.order, count))
        return work


def _due_now(waiting: list[EarlyBuild], step: int) -> int:
    """Slices of this step, so that as many in each step to come are in time."""
    total = most = 0
    for build in waiting:
        total += build.slices_left
        steps_left = max(build.due_step - step, 1)
        if total >= steps_left:
            most = max(most, -(-total // steps_left))
    return most
