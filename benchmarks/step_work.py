"""Time what a decode step does once for all layers: the snapshot of the cluster pool."""

from __future__ import annotations

import torch

from benchmarks.timing import Quantiles, time_graph
from multipole_kernels.segment_snapshot import PoolIndex, SegmentSnapshot
from tests.decode_case import NUM_SINK_TOKENS, DecodeCase

RECLUSTER_INTERVAL = 128  # tokens


def time_snapshot(case: DecodeCase, min_context: int = 4096) -> Quantiles:
    """The snapshot of a batch all of whose rows are above min_context.

    Raises:
        RuntimeError: it did not find every sealed segment, so that the time would say nothing.
    """
    device, segment_size = case.q.device, case.pool_layer.segment_slots.shape[1]
    num_rows, num_places = len(case.rows), len(case.pool_layer.segment_slots)
    context = max(len(row.slots) for row in case.rows)
    num_slots = len(case.k_cache)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    index = PoolIndex(
        segment_slots=case.pool_layer.segment_slots,
        segment_slot_generation=new(num_places, segment_size),
        segment_extent=new(num_places),
        last_used=new(num_places, dtype=torch.int64),
        segment_of_slot=new(num_slots),
        slot_generation=new(num_slots),
        open_place=new(num_rows),
    )
    table = new(num_rows, context)
    num_sealed = 0
    for nth, row in enumerate(case.rows):
        table[nth, : len(row.slots)] = row.slots.int()
        sealed = row.num_clustered_tokens // segment_size
        places = torch.tensor(row.places[:sealed], dtype=torch.int32, device=device)
        index.segment_extent[places.long()] = segment_size
        index.segment_of_slot[row.slots[segment_size - 1 :: segment_size][:sealed]] = places
        num_sealed += sealed
    max_segments = -(-context // segment_size)
    snapshot = SegmentSnapshot(
        num_rows, max_segments, num_rows * max_segments, num_rows * context, device
    )
    rows = torch.arange(num_rows, device=device)
    lengths = torch.tensor([len(row.slots) for row in case.rows], device=device)

    def take() -> None:
        snapshot.take(
            index,
            table,
            rows,
            lengths,
            7,
            min_context=min_context,
            recluster_interval=RECLUSTER_INTERVAL,
            num_sink_tokens=NUM_SINK_TOKENS,
        )

    take()
    num_found = int(snapshot.plan.item_indptr[num_rows])
    if num_found != num_sealed:
        raise RuntimeError(f"the snapshot found {num_found} of {num_sealed} segments")
    return time_graph([take])
