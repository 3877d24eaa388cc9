"""SGLang's own allocator, row pool and radix cache with our runtime, without a model or a server.

`PoolHost` does to them what SGLang's scheduler does, in its order: matching and chunking, the
rewriting of a row's slots at the end of a prefill, overlapped results, the overshoot step of a
finished request, retraction, eviction and flush. Keys and values are a function of the token path,
so that equal prefixes have equal ones, and a slot that is freed is filled with NaN.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from collections.abc import Callable, Generator
from types import SimpleNamespace

import numpy as np
import torch

from sglang_multipole import attach, sglang_compat
from sglang_multipole.cluster_pool import ClusterPool, PoolShape
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.runtime import MultipoleRuntime, PendingFeedback
from sglang_multipole.segment_builder import SegmentBuilder
from sglang_multipole.torch_clustering import TorchClustering
from sglang_multipole.torch_path import TorchPath
from tests.pool_request import MAX_LEN, Request
from tests.pool_slots import SlotWatch

HEADS, GROUP, DIM = 2, 2, 4
NUM_TABLE_ROWS = 8191
IDLE_SLICES = 5  # behind each that does something


def small_config(**changes: object) -> MultipoleConfig:
    """Segments of 32 tokens: less than an operator may set, so that the limits are hit often."""
    config = MultipoleConfig.from_dict(
        {
            "recluster_interval": 16,
            "tokens_per_cluster": 4,
            "max_cluster_size_ratio": 3,
            "centroid_dtype": "auto",
            "num_sink_tokens": 3,
            "min_context": 40,
            "token_budget": 12,
            "num_lloyd_iters": 2,
            "strict_activation": True,
        }
        | changes
    )
    object.__setattr__(config, "segment_size", 32)
    return config


class ManySlices(TorchClustering):
    """As slow as with many layers: two requests at once need every step of an interval."""

    def slices(self, order: tuple[int, int, int, int]) -> Generator[None]:
        for _ in super().slices(order):
            for _ in range(IDLE_SLICES):
                yield
            yield

    def num_slices(self) -> int:
        return (1 + IDLE_SLICES) * super().num_slices()


@dataclasses.dataclass
class Result:
    """A launched batch whose results the scheduler has not processed."""

    is_decode: bool
    members: list[tuple[Request, int]]  # with their incarnation at the launch
    feedback: PendingFeedback | None = None


class PoolHost:
    """Args: has_overlap: results of a step are processed after the next one's launch."""

    def __init__(
        self,
        config: MultipoleConfig,
        num_slots: int = 640,
        num_rows: int = 6,
        num_places: int = 160,
        has_overlap: bool = True,
        sorts_slots: bool = False,
    ):
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.config, self.has_overlap, self.num_slots = config, has_overlap, num_slots
        generator = torch.Generator().manual_seed(3)
        table = torch.randn(2, NUM_TABLE_ROWS, HEADS, DIM, generator=generator)
        self.key_table, self.value_table = table.unbind()
        angle = torch.rand(MAX_LEN + 8, DIM // 2, generator=generator) * 6
        nan = torch.full((num_slots + 1, HEADS, DIM), torch.nan)
        self.layer = KVLayer(nan.clone(), nan.clone(), angle.cos(), angle.sin())
        self.req_to_token_pool = ReqToTokenPool(num_rows, MAX_LEN + 8, "cpu", False)
        self.req_to_token = self.req_to_token_pool.req_to_token
        self.allocator = TokenToKVPoolAllocator(
            num_slots, torch.int64, "cpu", None, need_sort=sorts_slots
        )
        self.slots = SlotWatch(self.allocator, self.layer, num_slots)
        self.tree = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.req_to_token_pool,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
            )
        )
        shape = PoolShape(1, HEADS, DIM, num_slots + 1, num_rows + 1, torch.float32, "cpu")
        pool = ClusterPool(config, shape, num_places)
        clustering = ManySlices(pool, [self.layer], self.req_to_token)
        builder = SegmentBuilder(pool, clustering, self.req_to_token)
        self.path = TorchPath(pool, [self.layer], self.req_to_token)
        self.runtime = MultipoleRuntime(config, pool, builder, self.path)
        attach._watch(self.allocator, self.runtime)

        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.is_chunk_stashed = True
        self.results: deque[Result] = deque()
        self.finished: list[array] = []
        self.num_requests = 0
        # called with the requests of a decode step and its results, before they are processed
        self.after_step: Callable[[list[Request], PendingFeedback], None] = lambda *_: None

    # ------------------------------------------------------------------ requests and prefill

    def submit(self, prompt: array, salt: int) -> None:
        self.num_requests += 1
        self.waiting.append(Request(f"r{self.num_requests}", prompt, salt))

    def available(self) -> int:
        return self.allocator.available_size() + self.tree.evictable_size()

    def prefill(self, max_requests: int, max_tokens: int) -> None:
        """Prefill waiting requests side by side, at most max_tokens in all; the last is chunked."""
        if self.has_overlap and self.results and not self.results[-1].is_decode:
            self.process_results()
        self._stash_chunk()
        batch: list[tuple[Request, int]] = []  # with the prefix length
        if self.chunked is not None:
            request, self.chunked = self.chunked, None
            count = self._admit(request, len(request.prefix_indices), max_tokens)
            if not count:
                self.chunked = request
                return
            batch.append((request, len(request.prefix_indices)))
            max_tokens -= count
        rows_left = self.req_to_token_pool.available_size()
        while self.waiting and len(batch) < max_requests and max_tokens > 0 and rows_left:
            request = self.waiting[0]
            if self.chunked is not None:
                break
            self._match(request)
            reserved = sum(r.fill_len - prefix for r, prefix in batch)
            count = self._admit(request, len(request.prefix_indices), max_tokens, reserved)
            if not count:
                self.tree.dec_lock_ref(request.last_node)
                break
            self.waiting.popleft()
            batch.append((request, len(request.prefix_indices)))
            max_tokens -= count
            rows_left -= 1
        if batch:
            self._launch_prefill(batch)

    def _match(self, request: Request) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(request.tokens[: len(request.tokens) - 1])
        match = self.tree.match_prefix(MatchPrefixParams(key=key))
        request.prefix_indices, request.last_node = match.device_indices, match.last_device_node
        request.cache_protected_len = len(request.prefix_indices)
        self.tree.inc_lock_ref(request.last_node)

    def _admit(self, request: Request, prefix: int, max_tokens: int, reserved: int = 0) -> int:
        """Tokens to prefill now, 0 if they do not fit the KV pool; sets fill_len and chunked."""
        wanted = len(request.tokens) - prefix
        count = min(wanted, max_tokens)
        if count + reserved + len(self.running) > self.available():
            return 0
        request.fill_len = prefix + count
        if count < wanted:
            self.chunked, self.is_chunk_stashed = request, False
            request.inflight_middle_chunks += 1
        return count

    def _launch_prefill(self, batch: list[tuple[Request, int]]) -> None:
        from sglang.srt.mem_cache.allocation import alloc_token_slots

        requests = [request for request, _ in batch]
        self.req_to_token_pool.alloc(requests)
        counts = [request.fill_len - prefix for request, prefix in batch]
        slots = alloc_token_slots(self.tree, sum(counts)).split(counts)
        for (request, prefix), new in zip(batch, slots, strict=True):
            row = request.req_pool_idx
            self.req_to_token_pool.write((row, slice(0, prefix)), request.prefix_indices.int())
            self.req_to_token_pool.write((row, slice(prefix, request.fill_len)), new.int())
            self._write_kv(new, request.path[prefix : request.fill_len])
            request.kv_committed_len = request.fill_len
            if request is not self.chunked:
                request.sample()
                self.running.append(request)
        self._launched(Result(False, [(r, r.incarnation) for r in requests]))

    def _stash_chunk(self) -> None:
        if not self.is_chunk_stashed:
            self.tree.cache_unfinished_req(self.chunked, chunked=True)
            self.is_chunk_stashed = True

    def _write_kv(self, slots: torch.Tensor, path: np.ndarray) -> None:
        index = torch.from_numpy(path % NUM_TABLE_ROWS)
        self.layer.key_buffer[slots] = self.key_table[index]
        self.layer.value_buffer[slots] = self.value_table[index]

    # ------------------------------------------------------------------------------- decode

    def decode(self, num_retracted: int = 0) -> list[Request]:
        """One decode step of all running requests; returns them. None are left when empty."""
        from sglang.srt.mem_cache.allocation import alloc_token_slots

        self._stash_chunk()
        self.running = [r for r in self.running if not r.is_finished]
        while self.running and (num_retracted > 0 or self.available() < len(self.running)):
            if len(self.running) == 1 and num_retracted > 0:
                break
            self._retract(self.running.pop())
            num_retracted -= 1
        batch = list(self.running)
        if not batch:
            return batch
        rows = torch.tensor([r.req_pool_idx for r in batch])
        before = torch.tensor([r.kv_committed_len for r in batch])
        slots = alloc_token_slots(self.tree, len(batch))
        self.req_to_token_pool.write((rows, before), slots.int())
        last = np.array([r.path[r.kv_committed_len] for r in batch])
        for request in batch:
            request.kv_committed_len += 1
        scheduled = SimpleNamespace(
            reqs=batch,
            req_pool_indices_cpu=rows,
            seq_lens_cpu=before + 1,
            req_to_token_pool=self.req_to_token_pool,
        )
        self.runtime.plan_step(
            sglang_compat.decode_rows(scheduled, self.config), [r.activity for r in batch]
        )
        self.runtime.begin_step(rows, before + 1)
        # the forward's own: what begins before it finds the slots as they were
        self._write_kv(slots, last)
        feedback = self.runtime.end_step()
        self.after_step(batch, feedback)
        for request in batch:
            request.sample()
        self._launched(Result(True, [(r, r.incarnation) for r in batch], feedback))
        return batch

    def _launched(self, result: Result) -> None:
        self.results.append(result)
        while len(self.results) > (1 if self.has_overlap else 0):
            self._process(self.results.popleft())

    def process_results(self) -> None:
        """What an iteration without a batch does."""
        while self.results:
            self._process(self.results.popleft())

    def _process(self, result: Result) -> None:
        if result.feedback is not None:
            self.runtime.apply_feedback(result.feedback)
            self.allocator.free_group_begin()
        for request, incarnation in result.members:
            if request.is_finished or request.incarnation != incarnation:
                continue
            if request.inflight_middle_chunks:
                request.inflight_middle_chunks -= 1
                continue
            known = len(request.origin_input_ids) + len(request.output_ids)
            request.output_ids.append(request.tokens[known])
            if request.is_finishing or len(request.tokens) >= MAX_LEN:
                request.is_finished = True
                self._release(request, is_insert=True)
                self.finished.append(request.origin_input_ids + request.output_ids)
            elif not result.is_decode:
                self.tree.cache_unfinished_req(request)
        if result.feedback is not None:
            self.allocator.free_group_end()

    # ------------------------------------------------------------------------- ends of a life

    def _release(self, request: Request, is_insert: bool) -> None:
        self.tree.cache_finished_req(
            request, is_insert=is_insert, kv_len_to_handle=request.kv_committed_len
        )
        self.req_to_token_pool.free(request)

    def _retract(self, request: Request) -> None:
        """Back to the queue, with the tokens the scheduler knows."""
        self._release(request, is_insert=False)
        request.incarnation += 1
        request.kv_committed_len = request.cache_protected_len = 0
        request.inflight_middle_chunks = 0
        request.last_node = None
        known = len(request.origin_input_ids) + len(request.output_ids)
        request.tokens = request.tokens[:known]
        request.num_hashed = known
        self.waiting.append(request)

    def pause(self) -> None:
        """SGLang's pause with mode retract: every request goes back to the queue at once."""
        self.process_results()
        self._stash_chunk()
        chunked, self.chunked = self.chunked, None
        waiting, self.waiting = self.waiting, deque()
        for request in [*self.running, *([chunked] if chunked else [])]:
            if not request.is_finished:
                self._retract(request)
        self.waiting.extend(waiting)
        self.running = []

    def evict(self, num_tokens: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.tree.evict(EvictParams(num_tokens=num_tokens))

    def flush(self) -> bool:
        """SGLang's flush_cache: only when nothing runs."""
        if self.chunked or any(not r.is_finished for r in self.running):
            return False
        self.running = []
        self.tree.reset()
        self.req_to_token_pool.clear()
        self.allocator.clear()
        return True
