"""Sends many requests at a time, shows progress, and gives every one of them its outcome."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sglang_multipole.evaluation.client import Answer, Client, Sampling
from sglang_multipole.evaluation.task import Prompt, Task

LOG_LINES = 10  # for each task, where there is no terminal

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One request; the score is None if it failed."""

    sample: int
    repeat: int
    answer: Answer
    score: float | None
    reference: Any


def ask_all(
    client: Client,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    repeats: int,
    seed: int,
    concurrency: int,
    console: Console,
    title: str,
) -> list[Outcome]:
    """Ask every prompt `repeats` times, with the seeds seed, seed + 1, ...; in order of samples."""

    def ask(job: tuple[int, int]) -> Outcome:
        sample, repeat = job
        prompt = prompts[sample]
        answer = client.ask(prompt, sampling, seed + repeat if sampling.temperature > 0 else None)
        score = None if answer.error else task.score(answer.text, prompt.reference)
        return Outcome(sample, repeat, answer, score, prompt.reference)

    jobs = [(sample, repeat) for sample in range(len(prompts)) for repeat in range(repeats)]
    return run_all(ask, jobs, concurrency, console, title)


def run_all(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    concurrency: int,
    console: Console,
    title: str,
) -> list[Result]:
    """work(job) of every job, in the order of the jobs.

    The threads are daemons: an interrupt ends the command, whatever requests are open.

    Raises:
        Exception: the first that `work` raises.
    """
    waiting: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result | None, Exception | None]] = queue.SimpleQueue()
    for numbered in enumerate(jobs):
        waiting.put(numbered)

    def run() -> None:
        while True:
            try:
                number, job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, work(job), None))
            except Exception as error:  # handed to the caller
                done.put((number, None, error))

    for _ in range(min(concurrency, len(jobs))):
        threading.Thread(target=run, daemon=True).start()
    results: dict[int, Result] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown_live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown_live) as progress:
        bar = progress.add_task(title, total=len(jobs))
        for _ in jobs:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result
            progress.advance(bar)
            if not shown_live and _is_told(len(results), len(jobs)):
                console.print(f"{title}: {len(results)} of {len(jobs)}", markup=False)
    return [results[number] for number in range(len(jobs))]


def _is_told(done: int, total: int) -> bool:
    """Whether a log gets a line now: at each tenth of the way."""
    return done * LOG_LINES // total > (done - 1) * LOG_LINES // total
