"""The subcommand `eval`: tasks through a server, a table and a JSON file."""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
from typing import Any

from sglang_multipole.evaluation import (
    divergence,
    options,
    reference_file,
    report,
    result,
    runner,
    server_activity,
)
from sglang_multipole.evaluation.client import Client, RequestError, Sampling
from sglang_multipole.evaluation.task import Prompt, Task
from sglang_multipole.evaluation.tasks import registry
from sglang_multipole.evaluation.tokenizer import ModelTokenizer

USAGE_ERROR = 2
INTERRUPTED = 130
# an SGLang server tells its model's folder or name at one of these
MODEL_INFO_PATHS = ("/model_info", "/get_model_info")
SETTINGS_LEFT_OUT = ("base_url", "api_key", "json", "baseline", "reference", "save_reference")


def main(argv: list[str]) -> int:
    """Run it; 0 if every request was answered, 1 if one failed, 2 for a mistake in the options."""
    arguments = options.make_parser().parse_args(argv)
    try:
        return Evaluation(arguments).run()
    except ValueError as error:
        sys.stderr.write(f"sglang-multipole eval: {error}\n")
        return USAGE_ERROR
    except RequestError as error:
        sys.stderr.write(f"sglang-multipole eval: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("sglang-multipole eval: interrupted\n")
        return INTERRUPTED


class Evaluation:
    """One run of the command.

    Raises:
        ValueError: the options ask for what cannot be.
        RequestError: the server cannot be reached, or is not what the options require.
    """

    def __init__(self, arguments: argparse.Namespace):
        if not arguments.task and not arguments.reference:
            raise ValueError("eval: a task is required, got none; give --task, or --reference")
        if arguments.save_reference and not arguments.task:
            raise ValueError("eval: --save-reference must have a --task, got none")
        for path in (arguments.json, arguments.save_reference):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(
                    f"eval: results must go into a folder that is there, got {path}; make it first"
                )
        self.arguments = arguments
        self.progress = report.make_console(stderr=True)
        self.output = report.make_console()
        self.baseline = report.read_baseline(arguments.baseline) if arguments.baseline else None
        self.references = reference_file.read(arguments.reference) if arguments.reference else []
        self.tasks = [
            task
            for name in dict.fromkeys(arguments.task)
            for task in registry.make_tasks(name, arguments.ops, arguments.path, arguments.format)
        ]
        self.client = Client(
            arguments.base_url,
            api=arguments.api,
            model=arguments.model,
            api_key=arguments.api_key,
            timeout=arguments.timeout,
            retries=arguments.retries,
        )
        self.results: list[result.TaskResult] = []
        self.divergences: list[dict[str, Any]] = []
        self.activity: server_activity.Totals | None = None

    def run(self) -> int:
        """Ask, print, write."""
        model = self.client.model  # a server that is not there is told before any work
        before = server_activity.read_settled_totals(self.client)
        if self.arguments.require_multipole and before is None:
            raise RequestError(
                f"eval: --require-multipole needs a server with multipole attention, got none at "
                f"{self.client.root}; start it with --enable-multipole",
                retry=False,
            )
        self.progress.print(f"model {model} at {self.client.root}")
        if self.tasks:
            self._ask_tasks()
        for reference in self._references_to_measure():
            self._measure(reference)
        after = server_activity.read_settled_totals(self.client)
        if before is not None and after is not None:
            self.activity = after.since(before)
        self._write()
        if self.results:
            report.print_results(self.output, self.results, compared=self.baseline is not None)
        if self.divergences:
            report.print_divergences(self.output, self.divergences)
        report.print_activity(self.output, self.activity)
        if self.arguments.require_multipole and not (
            self.activity is not None and self.activity.sparse_steps > 0
        ):
            raise RequestError(
                "eval: --require-multipole needs sparse steps, got none; are the prompts shorter "
                "than the server's min_context?",
                retry=False,
            )
        failed = sum(row.failed for row in self.results)
        failed += sum(row["failed"] for row in self.divergences)
        return 1 if failed else 0

    def _ask_tasks(self) -> None:
        tokenizer = self._make_tokenizer()
        lengths = self.arguments.length or [None]
        # all prompts before any request: a length that cannot be is told at once
        rows = [
            (task, length, self._generate(task, length, tokenizer))
            for task in self.tasks
            for length in lengths
        ]
        recorded: list[reference_file.ReferenceTask] = []
        for task, length, prompts in rows:
            max_tokens = self.arguments.max_tokens or task.max_tokens
            title = task.name if length is None else f"{task.name} {length}"
            outcomes = runner.ask_all(
                self.client,
                task,
                prompts,
                Sampling(
                    self.arguments.temperature,
                    self.arguments.top_p,
                    max_tokens,
                    self.arguments.extra_body,
                ),
                repeats=self.arguments.repeats,
                seed=self.arguments.seed,
                concurrency=self.arguments.concurrency,
                console=self.progress,
                title=title,
            )
            row = result.summarise(task.name, length, prompts, outcomes, max_tokens)
            if self.baseline is not None:
                row.compare(self.baseline.get((task.name, length)))
            self.results.append(row)
            self._write()
            if self.arguments.save_reference:
                work = functools.partial(
                    divergence.record,
                    self.client,
                    max_tokens=min(max_tokens, self.arguments.reference_tokens),
                )
                ids = [tokenizer.encode(prompt) for prompt in prompts]
                answers = runner.run_all(
                    work, ids, self.arguments.concurrency, self.progress, f"{title}: reference"
                )
                recorded.append(reference_file.ReferenceTask(task.name, length, answers))
                reference_file.write(self.arguments.save_reference, recorded)

    def _generate(self, task: Task, length: int | None, tokenizer: ModelTokenizer) -> list[Prompt]:
        self.progress.print(f"making the prompts of {task.name}")
        return task.generate(self.arguments.samples, length, self.arguments.seed, tokenizer)

    def _measure(self, reference: reference_file.ReferenceTask) -> None:
        title = f"{reference.task} {reference.length or ''}: divergence"

        def work(answer: divergence.DenseAnswer) -> divergence.Divergence | RequestError:
            try:
                return divergence.measure(self.client, answer)
            except RequestError as error:
                return error

        measured = runner.run_all(
            work, reference.answers, self.arguments.concurrency, self.progress, title
        )
        errors = {str(one) for one in measured if isinstance(one, RequestError)}
        for error in sorted(errors):
            self.progress.print(f"{title}: {error}", style="red", markup=False)
        known = [None if isinstance(one, RequestError) else one for one in measured]
        self.divergences.append(reference_file.summarise(reference, known))
        self._write()

    def _references_to_measure(self) -> list[reference_file.ReferenceTask]:
        """With a baseline, the tasks for which accuracy is no evidence; without, all."""
        if self.baseline is None:
            return self.references
        return [
            reference
            for reference in self.references
            if not _is_evidence(self.baseline.get((reference.task, reference.length)))
        ]

    def _make_tokenizer(self) -> ModelTokenizer:
        path = self.arguments.tokenizer or self._ask_tokenizer_path()
        kwargs = self.arguments.extra_body.get("chat_template_kwargs")
        return ModelTokenizer(path, chat=self.arguments.api == "chat", template_kwargs=kwargs)

    def _ask_tokenizer_path(self) -> str:
        for path in MODEL_INFO_PATHS:
            try:
                info = self.client.get(path)
                return info.get("tokenizer_path") or info["model_path"]
            except (RequestError, KeyError, AttributeError):
                continue
        raise ValueError(
            "eval: the model's tokenizer must be known, got no model path from the server; "
            "give --tokenizer <folder or name>"
        )

    def _write(self) -> None:
        if not self.arguments.json:
            return
        settings = {
            name: value
            for name, value in vars(self.arguments).items()
            if name not in SETTINGS_LEFT_OUT
        }
        report.write_json(
            self.arguments.json,
            {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "base_url": self.client.root,
                "model": self.client.model,
                "multipole_config": server_activity.read_config(self.client),
                "settings": settings,
                "tasks": [row.to_dict() for row in self.results],
                "divergence": self.divergences,
                "activity": None if self.activity is None else self.activity.to_dict(),
            },
        )


def _is_evidence(row: dict[str, Any] | None) -> bool:
    accuracy = None if row is None else row["accuracy"]
    return accuracy is not None and accuracy >= result.EVIDENCE_ACCURACY
