"""The cluster pool's life on SGLang's own allocator, row pool and radix cache.

An operation is one thing that happens to requests or pools: a submission, a prefill or chunk of
some requests, a decode step, a retraction, an end, an eviction, a flush. After each the planner's
books are balanced; after each decode step the oracle (pool_oracle.py) compares the plan with the
requests' own tokens. A failure of the seeded test names the seed and the operation.

MULTIPOLE_POOL_OPERATIONS is the number of operations over all settings of the seeded test, in place
of 40,000: in each setting four times what the slowest deliberate fault takes to be caught.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.pool_faults import FAULTS
from tests.pool_machine import SETTINGS, PoolMachine, Setting, run_random

NUM_OPERATIONS = int(os.environ.get("MULTIPOLE_POOL_OPERATIONS", "40000"))
EXPENSIVE_SHARE = 0.02  # of payloads, outputs and pools that are computed anew
NUMBER = st.integers(0, 1 << 20)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_operation_breaks_the_pool(name: str) -> None:
    per_setting = NUM_OPERATIONS // len(SETTINGS)
    machine = PoolMachine(SETTINGS[name], EXPENSIVE_SHARE, seed=1)
    run_random(machine, seed=1, num_operations=per_setting)

    assert machine.num_operations == per_setting
    # the run was worth something: every check was made, and segments were built and shared
    assert min(machine.oracle.counts.values()) > per_setting // 2000, machine.oracle.counts
    stats = machine.host.runtime.planner.stats
    assert min(stats.segments_built, stats.segments_shared) > per_setting // 100
    assert stats.early_builds > per_setting // 100


class PoolStateMachine(RuleBasedStateMachine):
    """The same operations in an order that hypothesis chooses, and shrinks when one fails."""

    machine: PoolMachine | None = None

    @initialize(name=st.sampled_from(sorted(SETTINGS)))
    def start(self, name: str) -> None:
        self.machine = PoolMachine(SETTINGS[name], share=0.2)

    @rule(source=NUMBER, keep=NUMBER, extra=NUMBER, copies=NUMBER, salt=st.integers(0, 2))
    def submit(self, source: int, keep: int, extra: int, copies: int, salt: int) -> None:
        self.machine.submit(source, keep, extra, copies, salt)

    @rule(max_requests=st.integers(0, 3), max_tokens=st.integers(0, 3))
    def prefill(self, max_requests: int, max_tokens: int) -> None:
        self.machine.prefill(max_requests, max_tokens)

    @rule(count=st.integers(1, 20))
    def decode(self, count: int) -> None:
        for _ in range(count):
            self.machine.decode()

    @precondition(lambda self: len(self.machine.host.running) > 1)
    @rule(count=st.integers(0, 2))
    def retract(self, count: int) -> None:
        self.machine.retract(count)

    @precondition(lambda self: self.machine.host.running)
    @rule(resume=st.integers(0, 1))
    def pause(self, resume: int) -> None:
        self.machine.pause(resume)

    @precondition(lambda self: self.machine.host.running)
    @rule(index=st.integers(0, 5))
    def finish(self, index: int) -> None:
        self.machine.finish(index)

    @precondition(lambda self: self.machine.host.waiting)
    @rule(index=st.integers(0, 5))
    def abort_waiting(self, index: int) -> None:
        self.machine.abort_waiting(index)

    @rule(count=NUMBER)
    def evict(self, count: int) -> None:
        self.machine.evict(count)

    @rule()
    def idle(self) -> None:
        self.machine.idle()

    @rule(first_idle=st.integers(0, 5))
    def flush(self, first_idle: int) -> None:
        self.machine.flush(first_idle)

    @invariant()
    def books_are_balanced(self) -> None:
        if self.machine is not None:
            self.machine.check()


TestPoolStateMachine = PoolStateMachine.TestCase
TestPoolStateMachine.settings = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


# the kind of server in which a fault shows soonest
SETTING_OF_FAULT = {
    "generation_not_bumped": "overlap-tiny-kv",
    "one_slot_not_compared": "plain-lazy-few-rows",
    "place_reused_one_step_too_early": "overlap-full",
    "kills_after_builds": "overlap-full",
    "open_place_leaked": "overlap-ample",
    "open_segment_survives_its_request": "plain-full",
    "host_state_survives_its_request": "plain-few-rows",
    "place_begun_leaked": "overlap-ample",
    "given_up_clustering_goes_on": "overlap-ample",
    "half_written_place_found": "overlap-ample",
    "begun_one_token_too_early": "plain-few-rows",
    "published_as_soon_as_done": "overlap-ample",
}
OPERATIONS_TO_CATCH = 2400
OPERATIONS_PER_SEED = 800


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_caught(
    fault: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    FAULTS[fault](monkeypatch)
    num_operations = operations_until_caught(SETTINGS[SETTING_OF_FAULT[fault]])
    record_property("operations_until_caught", num_operations)
    assert num_operations <= OPERATIONS_TO_CATCH


def operations_until_caught(setting: Setting) -> int:
    """Operations, over several seeds, until a check fails: an oracle's or the pool's own."""
    total = 0
    for seed in range(OPERATIONS_TO_CATCH // OPERATIONS_PER_SEED):
        machine = PoolMachine(setting, EXPENSIVE_SHARE, seed)
        try:
            run_random(machine, seed, OPERATIONS_PER_SEED)
        except (AssertionError, RuntimeError):
            return total + machine.num_operations
        total += machine.num_operations
    return OPERATIONS_TO_CATCH + 1
