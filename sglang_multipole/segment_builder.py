"""Cluster segments: from keys and values in the KV pool to places in the cluster pool."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from sglang_multipole.cluster_pool import ClusterPool


@dataclasses.dataclass(frozen=True)
class BuildOrder:
    """Cluster tokens [segment * S, segment * S + extent) of a row into a free place, if missing."""

    row: int
    segment: int
    extent: int
    place: int


class Clustering(Protocol):
    """Who clusters: TorchClustering, or the kernels' SegmentClustering."""

    def cluster(self, orders: Sequence[tuple[int, int, int, int]]) -> None:
        """Write the payload of orders (row, segment, extent, place)."""

    def slices(self, order: tuple[int, int, int, int]) -> Generator[None]:
        """Do the same for one order in num_slices slices, one with each `next`."""

    def num_slices(self) -> int:
        """Slices of an order's clustering, whatever the order."""


@dataclasses.dataclass
class _Begun:
    """A clustering in slices. Its generator holds scratch until it is closed."""

    slices: Generator[None]
    num_left: int

    def advance(self, count: int) -> None:
        for _ in range(count):
            next(self.slices)
        self.num_left -= count
        if not self.num_left:
            self.slices.close()


class SegmentBuilder:
    """Executes build orders on the current stream, which must be the forward's.

    Args:
        req_to_token: [rows, context] int32, SGLang's map from positions to KV slots.
    """

    def __init__(self, pool: ClusterPool, clustering: Clustering, req_to_token: torch.Tensor):
        self.pool, self.clustering, self.req_to_token = pool, clustering, req_to_token
        self._begun: dict[BuildOrder, _Begun] = {}

    @property
    def num_begun(self) -> int:
        """Orders of later steps that were begun."""
        return len(self._begun)

    def advance(self, order: BuildOrder, num_slices: int) -> None:
        """Do slices of an order of a later step; with the first, its place is taken.

        The tokens must be those that the row has now, or the row will not find the segment.
        """
        if order not in self._begun:
            rows, segments, _, places = self._columns([order])
            self.pool.describe(places, self._slots(rows, segments, order.extent))
            slices = self.clustering.slices(dataclasses.astuple(order))
            self._begun[order] = _Begun(slices, self.clustering.num_slices())
        self._begun[order].advance(num_slices)

    def cancel(self, orders: Sequence[BuildOrder]) -> None:
        """Forget orders that were begun; their places are others' from here on."""
        for order in orders:
            self._begun.pop(order).slices.close()

    def clear(self) -> None:
        """Forget all that was begun."""
        self.cancel(list(self._begun))

    def execute(self, orders: Sequence[BuildOrder]) -> list[bool]:
        """Build what is missing, from the beginning or from where `advance` has come.

        Waits for the device once if a sealed segment is among the orders, which happens when a
        request begins to decode and once in segment_size of its tokens.

        Returns:
            For each order, whether its place was written; false when the pool already held the
            segment (another request's, one built earlier in this call, or the place itself).
        """
        known = self._known(orders)
        # sealed ones first, see ClusterPool.publish
        missing = sorted(
            (order for order in orders if order not in known), key=lambda order: -order.extent
        )
        if missing:
            self._build([order for order in missing if order not in self._begun])
            for order in missing:
                if order in self._begun:
                    self._begun[order].advance(self._begun[order].num_left)
            rows, segments, extents, places = self._columns(missing)
            slots = self._slots(rows, segments, missing[0].extent)
            num_sealed = sum(order.extent == self.pool.config.segment_size for order in missing)
            self.pool.publish(places, slots, rows, extents, num_sealed)
        self.cancel([order for order in orders if order in self._begun])
        return [order not in known for order in orders]

    def _build(self, orders: Sequence[BuildOrder]) -> None:
        """Cluster orders, the longest first, from the beginning."""
        if not orders:
            return
        rows, segments, _, places = self._columns(orders)
        self.pool.describe(places, self._slots(rows, segments, orders[0].extent))
        self.clustering.cluster([dataclasses.astuple(order) for order in orders])

    def _known(self, orders: Sequence[BuildOrder]) -> set[BuildOrder]:
        """The orders that need no building, if there are sealed segments among them.

        An open one needs none if its own place holds it.
        """
        pool, size = self.pool, self.pool.config.segment_size
        sealed = [order for order in orders if order.extent == size]
        if not sealed:
            return set()
        rows, segments, _, _ = self._columns(sealed)
        slots = self._slots(rows, segments, size)
        places = pool.segment_of_slot[slots[:, -1]].long()
        extent = pool.segment_extent[places]
        is_held = (extent == size) & pool.matches(places, slots, extent)
        opened = [order for order in orders if order.extent < size]
        is_open_held = self._are_open_held(opened)
        known, last_slots = set(), set()
        held = torch.cat([is_held, is_open_held, slots[:, -1]]).tolist()
        last = held[len(orders) :]
        for order, is_known, last_slot in zip(sealed, held, last, strict=False):
            if is_known or last_slot in last_slots:
                known.add(order)
            last_slots.add(last_slot)
        known.update(itertools.compress(opened, held[len(sealed) : len(orders)]))
        return known

    def _are_open_held(self, orders: Sequence[BuildOrder]) -> torch.Tensor:
        """[orders] bool: the rows find the segments, in the very places of the orders."""
        if not orders:
            return torch.zeros(0, dtype=torch.bool, device=self.req_to_token.device)
        pool = self.pool
        rows, segments, extents, places = self._columns(orders)
        is_own = (pool.open_place[rows] == places) & (pool.segment_extent[places] == extents)
        slots = self._slots(rows, segments, pool.config.segment_size)
        return is_own & pool.matches(places, slots, extents)

    def _columns(self, orders: Sequence[BuildOrder]) -> tuple[torch.Tensor, ...]:
        """row, segment, extent and place of each order, [orders] int64 on the device."""
        device = self.req_to_token.device
        table = torch.tensor(
            [dataclasses.astuple(order) for order in orders], pin_memory=device.type == "cuda"
        )
        return table.to(device, non_blocking=True).unbind(1)

    def _slots(self, rows: torch.Tensor, segments: torch.Tensor, extent: int) -> torch.Tensor:
        """[orders, extent] int64 KV slots, of each row's segment; any where the row is shorter."""
        begin = segments * self.pool.config.segment_size
        positions = begin.unsqueeze(-1) + torch.arange(extent, device=begin.device)
        positions = positions.clamp(max=self.req_to_token.shape[1] - 1)
        return self.req_to_token[rows.unsqueeze(-1), positions].long()
