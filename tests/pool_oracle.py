"""What must hold after every decode step, computed from the requests' tokens alone."""

from __future__ import annotations

import random

import numpy as np
import torch

from multipole_kernels import reference
from sglang_multipole.runtime import PendingFeedback
from tests.pool_host import DIM, GROUP, HEADS, NUM_TABLE_ROWS, PoolHost
from tests.pool_request import Request

SM_SCALE = DIM**-0.5


class Payload:
    """A segment's clusters, from the reference: head by head."""

    def __init__(self, host: PoolHost, path: np.ndarray, begin: int, segment: int):
        config = host.config
        index = torch.from_numpy(path % NUM_TABLE_ROWS)
        keys = host.key_table[index].transpose(0, 1)
        values = host.value_table[index].transpose(0, 1)
        positions = slice(begin, begin + len(path))
        features = reference.unrotate(keys, host.layer.cos[positions], host.layer.sin[positions])
        num_clusters = -(-len(path) // config.tokens_per_cluster)
        self.cluster_ids = reference.cluster_segment(
            features, num_clusters, config.max_cluster_size, config.num_lloyd_iters, segment
        )
        summary = reference.summarize_clusters(keys, values, self.cluster_ids, num_clusters)
        self.key_centroids, self.value_centroids, self.sizes, self.variance, pair_weight = summary
        self.segment_pair_weight = pair_weight
        self.pair_weight = pair_weight.unsqueeze(1).expand(-1, num_clusters, -1)
        self.key_sum = keys.sum(1).numpy()


class Oracle:
    """Checks a host; share is how many of the expensive comparisons are made (1: all)."""

    def __init__(self, host: PoolHost, share: float, seed: int, expects_pure: bool):
        self.host, self.share, self.random = host, share, random.Random(seed)
        # large enough a pool and strict_activation: clusters are a function of the length alone
        self.expects_pure = expects_pure
        self.generator = torch.Generator().manual_seed(seed)
        self.payloads: dict[tuple[int, int, int], Payload] = {}
        self.held: dict[int, int] = {}  # place -> hash of the sealed segment's slots and births
        # of the last two steps of a request: its sealed segments and a hash of their slots
        self.found: dict[str, tuple[int, dict[int, int], dict[int, int]]] = {}
        self.counts = dict.fromkeys(("items", "payloads", "outputs", "orders", "shared_items"), 0)
        pool = host.runtime.pool
        names = ("segment_slots", "members", "cluster_sizes", "key_centroids", "segment_extent")
        self.pool = {name: getattr(pool, name).numpy() for name in names}

    # --------------------------------------------------------------------------- every step

    def check_step(self, batch: list[Request], feedback: PendingFeedback) -> None:
        """After the launch of a decode step of these requests."""
        if not feedback.plan.is_sparse:
            assert not any(self._num_clustered(r.kv_committed_len) for r in batch)
            return
        decode_plan = self.host.path.plan
        indptr, exact_indptr = decode_plan.item_indptr.numpy(), decode_plan.exact_indptr.numpy()
        item_place, exact_slots = decode_plan.item_place.numpy(), decode_plan.exact_slots.numpy()
        found = feedback.results.read()[0]
        head = self.random.randrange(HEADS)
        places_used: dict[int, int] = {}
        for i, request in enumerate(batch):
            places = item_place[indptr[i] : indptr[i + 1]].tolist()
            exact = exact_slots[exact_indptr[i] : exact_indptr[i + 1]]
            length = request.kv_committed_len
            slots = self.host.req_to_token.numpy()[request.req_pool_idx, :length]
            assert self.host.slots.is_live[slots].all(), f"{request.rid}: a slot of the row is free"
            extents = {k: extent for k, extent in enumerate(found[i]) if extent}
            self._check_extents(request, length, extents, feedback.plan.step)
            is_sparse = self._num_clustered(length) > 0
            assert len(places) == (len(extents) if is_sparse else 0), f"{request.rid}: items"
            self._check_cover(request, slots, exact, places, head)
            for place, (segment, extent) in zip(places, extents.items(), strict=False):
                self._check_payload(request, place, segment, extent, head)
                places_used[place] = places_used.get(place, 0) + 1
        self.counts["shared_items"] += sum(count > 1 for count in places_used.values())
        self._check_orders(batch, feedback, found)
        if batch and self.random.random() < self.share:
            self._check_output(batch)

    def _num_clustered(self, length: int) -> int:
        """Tokens that clusters stand for in a row of this length; 0 for one that is exact."""
        clustered = self.host.config.clustered_tokens(length)
        return clustered if clustered > self.host.config.token_budget else 0

    def _check_extents(
        self, request: Request, length: int, extents: dict[int, int], step: int
    ) -> None:
        size = self.host.config.segment_size
        clustered = self.host.config.clustered_tokens(length)
        pure = {k: min(clustered - k * size, size) for k in range(-(-clustered // size))}
        for segment, extent in extents.items():
            allowed = pure.get(segment, 0)
            assert extent == allowed or extent < allowed < size, (
                f"{request.rid}: {extent} tokens of segment {segment} are under clusters, "
                f"{allowed} may be at length {length}"
            )
        if self.expects_pure and self._num_clustered(length):
            assert extents == pure, f"{request.rid}: length {length} has {extents}, not {pure}"
        self._check_nothing_lost(request, extents, step)

    def _check_nothing_lost(self, request: Request, extents: dict[int, int], step: int) -> None:
        """A sealed segment that a row used in two steps is there in the next, if its slots are."""
        size = self.host.config.segment_size
        row = self.host.req_to_token.numpy()[request.req_pool_idx]

        def slots_of(segment: int) -> int:
            slots = row[segment * size : (segment + 1) * size]
            return hash((slots.tobytes(), self.host.slots.births[slots].tobytes()))

        last_step, before_last, last = self.found.get(request.rid, (0, {}, {}))
        if last_step != step - 1:
            before_last = last = {}
        for segment, slots in last.items():
            if before_last.get(segment) == slots == slots_of(segment):
                assert segment in extents, f"{request.rid}: segment {segment} lost while in use"
        now = {k: slots_of(k) for k, extent in extents.items() if extent == size}
        self.found[request.rid] = (step, last, now)

    def _check_cover(
        self,
        request: Request,
        slots: np.ndarray,
        exact: np.ndarray,
        places: list[int],
        head: int,
    ) -> None:
        """Every token of the row exactly once: exact, or member of a cluster of an item."""
        covered = [exact]
        for place in places:
            count = int(self.pool["cluster_sizes"][0, place, head].sum())
            members = self.pool["members"][0, place, head, :count]
            covered.append(self.pool["segment_slots"][place, members])
        covered_slots = np.sort(np.concatenate(covered))
        assert np.array_equal(covered_slots, np.sort(slots)), (
            f"{request.rid}: {len(covered_slots)} tokens are attended to, {len(slots)} there are"
        )

    def _check_orders(
        self, batch: list[Request], feedback: PendingFeedback, found: list[list[int]]
    ) -> None:
        """What was ordered is there; no sealed segment is built while a place holds it."""
        plan, size = feedback.plan, self.host.config.segment_size
        row_of = {request.req_pool_idx: i for i, request in enumerate(batch)}
        for place in plan.kills:
            self.held.pop(place, None)
        for order, is_built in zip(plan.orders, feedback.built, strict=True):
            self.counts["orders"] += 1
            assert found[row_of[order.row]][order.segment] == order.extent, (
                f"row {order.row}: segment {order.segment} was ordered and is not there"
            )
            if not is_built:
                continue
            self.held.pop(order.place, None)
            if order.extent == size:
                begin = order.segment * size
                slots = self.host.req_to_token.numpy()[order.row, begin : begin + size]
                key = hash((slots.tobytes(), self.host.slots.births[slots].tobytes()))
                assert key not in self.held.values(), (
                    f"segment {order.segment} was clustered twice: it is in another place"
                )
                self.held[order.place] = key

    # -------------------------------------------------------------------- expensive, sampled

    def _payload(self, request: Request, segment: int, extent: int) -> Payload:
        begin = segment * self.host.config.segment_size
        end = begin + extent
        key = (int(request.path[end - 1]), segment, extent)
        if key not in self.payloads:
            if len(self.payloads) > 4000:
                self.payloads.clear()
            begin += self.host.config.num_sink_tokens if segment == 0 else 0
            self.payloads[key] = Payload(self.host, request.path[begin:end], begin, segment)
        return self.payloads[key]

    def _check_payload(
        self, request: Request, place: int, segment: int, extent: int, head: int
    ) -> None:
        """The place's clusters are those of the row's own tokens: their sum always, all sampled."""
        self.counts["items"] += 1
        begin = segment * self.host.config.segment_size
        path = request.path[begin : begin + extent]
        if segment == 0:
            path = path[self.host.config.num_sink_tokens :]
        sizes = self.pool["cluster_sizes"][0, place, head].astype(np.float32)
        total = sizes @ self.pool["key_centroids"][0, place, head]
        expected = self.host.key_table.numpy()[path % NUM_TABLE_ROWS, head].sum(0)
        assert np.abs(total - expected).max() < 1e-3, (
            f"{request.rid}: place {place} does not hold the row's segment {segment}"
        )
        if self.random.random() < self.share:
            self._check_whole_payload(request, place, segment, extent)

    def _check_whole_payload(self, request: Request, place: int, segment: int, extent: int) -> None:
        self.counts["payloads"] += 1
        expected, pool = self._payload(request, segment, extent), self.host.runtime.pool
        sinks = self.host.config.num_sink_tokens if segment == 0 else 0
        count = expected.sizes.shape[-1]
        what = f"{request.rid}: place {place}, segment {segment}, {extent} tokens"
        assert torch.equal(pool.cluster_sizes[0, place, :, :count].int(), expected.sizes), what
        assert not pool.cluster_sizes[0, place, :, count:].any(), what
        for name in ("key_centroids", "value_centroids"):
            actual = getattr(pool, name)[0, place, :, :count]
            torch.testing.assert_close(actual, getattr(expected, name), msg=what)
        actual = pool.key_variance[0, place, :, :count]
        torch.testing.assert_close(actual, expected.variance, msg=what)
        actual = pool.pair_weight[0, place]
        torch.testing.assert_close(actual, expected.segment_pair_weight, msg=what)
        members = expected.cluster_ids.argsort(dim=-1, stable=True) + sinks
        assert torch.equal(pool.members[0, place, :, : members.shape[1]].long(), members), what
        begins = expected.sizes.cumsum(-1) - expected.sizes
        assert torch.equal(pool.member_begin[0, place, :, :count].long(), begins), what

    def _check_output(self, batch: list[Request]) -> None:
        """The step's attention against the reference on the rows' own tokens."""
        self.counts["outputs"] += 1
        q = torch.randn(len(batch), HEADS * GROUP, DIM, generator=self.generator)
        out = torch.full_like(q, torch.nan)
        self.host.path.attend(0, q, SM_SCALE, out)
        found = self.host.path.results(len(batch)).read()[0]
        for i, request in enumerate(batch):
            expected = self._reference(q[i], request, found[i])
            torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4, msg=request.rid)

    def _reference(self, q: torch.Tensor, request: Request, found: list[int]) -> torch.Tensor:
        config = self.host.config
        length = request.kv_committed_len
        index = torch.from_numpy(request.path[:length] % NUM_TABLE_ROWS)
        cluster_ids = torch.full((HEADS, length), -1)
        parts = []
        is_sparse = self._num_clustered(length) > 0
        for segment, extent in enumerate(found):
            if extent and is_sparse:
                payload = self._payload(request, segment, extent)
                begin = segment * config.segment_size
                end = begin + extent
                begin += config.num_sink_tokens if segment == 0 else 0
                offset = sum(part.sizes.shape[-1] for part in parts)
                cluster_ids[:, begin:end] = payload.cluster_ids + offset
                parts.append(payload)
        empty = torch.zeros(HEADS, 0, DIM)
        clusters = [
            torch.cat([getattr(part, name) for part in parts], 1) if parts else none
            for name, none in (
                ("key_centroids", empty),
                ("value_centroids", empty),
                ("sizes", torch.zeros(HEADS, 0, dtype=torch.int32)),
                ("variance", torch.zeros(HEADS, 0)),
                ("pair_weight", torch.zeros(HEADS, 0, DIM // 2)),
            )
        ]
        keys, values = self.host.key_table[index], self.host.value_table[index]
        out, _, _ = reference.multipole_attention(
            q,
            keys,
            values,
            cluster_ids,
            *clusters,
            config.token_budget,
            SM_SCALE,
            config.max_logit_variance,
        )
        return out
