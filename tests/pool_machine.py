"""Operations on a PoolHost, each followed by its checks: for hypothesis and for a seeded driver."""

from __future__ import annotations

import dataclasses
import random
from array import array

from tests.pool_host import PoolHost, small_config
from tests.pool_oracle import Oracle
from tests.pool_request import MAX_LEN


@dataclasses.dataclass(frozen=True)
class Setting:
    """One kind of server: an ample or a full cluster pool, overlapped or not, strict or not."""

    has_overlap: bool
    num_places: int
    is_strict: bool = True
    num_slots: int = 640
    num_rows: int = 6
    max_builds_per_step: int = 256
    # SGLang's allocator hands out the lowest free slots first: a new prompt often gets the very
    # slots of an old one, in order
    sorts_slots: bool = False


AMPLE = 240
SETTINGS = {
    "overlap-ample": Setting(True, AMPLE),
    "plain-ample": Setting(False, AMPLE),
    "overlap-full": Setting(True, 18),
    "plain-full": Setting(False, 12),
    "overlap-lazy": Setting(True, 40, is_strict=False, max_builds_per_step=2),
    "overlap-small-kv": Setting(True, AMPLE, num_slots=300),
    "plain-few-rows": Setting(False, AMPLE, num_rows=3),
    "overlap-few-rows": Setting(True, AMPLE, num_rows=3),
    "plain-lazy-few-rows": Setting(False, 40, False, num_rows=2, max_builds_per_step=1),
    "overlap-tiny-kv": Setting(True, AMPLE, num_slots=210, num_rows=2, sorts_slots=True),
}


class PoolMachine:
    """A host, its oracle, and operations that are always possible: what cannot be done is nothing.

    Whole numbers choose what an operation does; any number is allowed.
    """

    def __init__(self, setting: Setting, share: float = 1.0, seed: int = 0):
        config = small_config(
            strict_activation=setting.is_strict, max_builds_per_step=setting.max_builds_per_step
        )
        self.host = PoolHost(
            config,
            setting.num_slots,
            setting.num_rows,
            setting.num_places,
            setting.has_overlap,
            setting.sorts_slots,
        )
        is_pure = setting.is_strict and setting.num_places == AMPLE
        self.oracle = Oracle(self.host, share, seed, is_pure)
        self.host.after_step = self.oracle.check_step
        self.share, self.random = share, random.Random(seed)
        self.prompts: list[array] = []
        self.next_token = 10
        self.num_operations = 0

    def check(self) -> None:
        """After every operation."""
        self.num_operations += 1
        self.host.runtime.planner.check_integrity()
        if self.random.random() < self.share / 2:
            self.host.runtime.pool.check_integrity()

    # --------------------------------------------------------------------------- operations

    def submit(self, source: int, keep: int, extra: int, copies: int, salt: int) -> None:
        """Requests that share a prefix of an earlier prompt or answer, or of nothing."""
        if len(self.host.waiting) > 6:
            return
        known = self.host.finished[-12:] + self.prompts[-4:]
        prompt = array("q")
        if known and source % 4:
            text = known[source % len(known)]
            keep = len(text) if keep % 3 == 0 else keep % (len(text) + 1)
            # two prompts that part at the last token of a segment or of an open one
            prompt = text[: keep // 16 * 16 - 1 if keep % 2 and keep > 16 else keep]
        extra = extra % 90 if extra % 3 else extra % 24
        for _ in range(extra + (0 if len(prompt) > 5 else 6)):
            self.next_token += 1
            prompt.append(self.next_token)
        prompt = prompt[: MAX_LEN - 20]
        self.prompts.append(prompt)
        for copy in range(1 + copies % 3):
            self.host.submit(prompt, salt + copy * (copies % 2))

    def prefill(self, max_requests: int, max_tokens: int) -> None:
        self.host.prefill(1 + max_requests % 4, (24, 70, 200, 600)[max_tokens % 4])

    def decode(self) -> None:
        self.host.decode()

    def retract(self, count: int) -> None:
        self.host.decode(num_retracted=1 + count % 3)

    def pause(self, resume: int) -> None:
        self.host.pause()
        if resume % 2:
            self.host.prefill(8, 1000)

    def finish(self, index: int) -> None:
        """The request's next token is its last; an abort of a running request is the same."""
        if self.host.running:
            self.host.running[index % len(self.host.running)].is_finishing = True

    def abort_waiting(self, index: int) -> None:
        if self.host.waiting:
            del self.host.waiting[index % len(self.host.waiting)]

    def evict(self, count: int) -> None:
        self.host.evict(1 + count % 150)

    def idle(self) -> None:
        self.host.process_results()

    def flush(self, first_idle: int) -> None:
        """End everything and flush, with the last step's results processed before or after."""
        for request in self.host.running:
            request.is_finishing = True
        for _ in range(1 + first_idle % 2):
            self.host.decode()
        if first_idle % 3 == 0:
            self.host.process_results()
        self.host.flush()


WEIGHTS = {
    "submit": 9,
    "prefill": 11,
    "decode": 64,
    "retract": 3,
    "pause": 1,
    "finish": 7,
    "abort_waiting": 1,
    "evict": 3,
    "idle": 3,
    "flush": 0.3,
}


def run_random(machine: PoolMachine, seed: int, num_operations: int) -> None:
    """Operations in a seeded random order; a failure's message has what repeats it."""
    chooser = random.Random(seed)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    num_arguments = {"submit": 5, "prefill": 2, "retract": 1, "finish": 1, "abort_waiting": 1}
    num_arguments |= {"evict": 1, "flush": 1, "pause": 1}
    for done in range(num_operations):
        name = chooser.choices(names, weights)[0]
        arguments = [chooser.randrange(1 << 20) for _ in range(num_arguments.get(name, 0))]
        try:
            getattr(machine, name)(*arguments)
            machine.check()
        except Exception as error:
            error.add_note(f"seed {seed}, operation {done}: {name}{tuple(arguments)}")
            raise
