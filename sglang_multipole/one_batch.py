"""SGLang's benchmark of one static batch (`sglang.benchmark.one_batch`) with multipole attention.

SGLang loads no plugins there, and without a scheduler nothing would plan decode steps: both are
done here, around SGLang's own functions. A step's latency has everything that it has in the server
except the scheduler's own work; its results are read before the next begins, so nothing overlaps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sglang_multipole import cpu_host
from sglang_multipole.activity import Activity
from sglang_multipole.runtime import MultipoleRuntime
from sglang_multipole.server_arguments import read_given


def main(argv: list[str]) -> int:
    """Run the benchmark with SGLang's flags; exit code 1 if it was to be sparse and never was."""
    cpu_host.prepare()
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins

    from sglang_multipole import plugin

    load_plugins()
    plugin.register_scheduler()
    runtimes: list[MultipoleRuntime] = []
    one_batch._TorchBenchRunner = _planned_runner(one_batch._TorchBenchRunner, runtimes)
    one_batch.main = _on_one_gpu(one_batch.main)
    sys.argv = ["bench-one-batch", *cpu_host.server_arguments(read_given(argv)), *argv]
    one_batch.cli_main()
    return max((_report(runtime) for runtime in runtimes), default=0)


def _planned_runner(base: type, runtimes: list[MultipoleRuntime]) -> type:
    """SGLang's benchmark runner, its decode steps planned and their results taken in."""
    from sglang_multipole import sglang_compat
    from sglang_multipole.attach import runtime_of

    class PlannedRunner(base):
        def __init__(self, model_runner: Any):
            super().__init__(model_runner)
            self._runtime = runtime_of(model_runner)
            if self._runtime is not None:
                runtimes.append(self._runtime)

        def decode(self, next_token_ids: Any, batch: Any) -> Any:
            runtime = self._runtime
            if runtime is None:
                return super().decode(next_token_ids, batch)
            prepare = type(batch).prepare_for_decode

            def prepare_and_plan() -> None:
                prepare(batch)
                rows = sglang_compat.decode_rows(batch, runtime.config)
                runtime.plan_step(rows, [Activity() for _ in rows])

            batch.prepare_for_decode = prepare_and_plan
            tokens_and_logits = super().decode(next_token_ids, batch)
            runtime.apply_feedback(runtime.end_step())
            return tokens_and_logits

    return PlannedRunner


def _on_one_gpu(main_of_sglang: Callable[..., None]) -> Callable[..., None]:
    def main_on_one_gpu(server_args: Any, bench_args: Any) -> None:
        if server_args.tp_size > 1:
            raise SystemExit(
                "bench-one-batch: SGLang's processes of other ranks load no plugins, so --tp-size "
                "must be 1; for several GPUs start a server and measure it with "
                "benchmarks/time_per_token.py"
            )
        main_of_sglang(server_args, bench_args)

    return main_on_one_gpu


def _report(runtime: MultipoleRuntime) -> int:
    """Print the proof of activity; 1 if no step was sparse."""
    totals = runtime.totals
    reasons = ", ".join(f"{why} {count}" for why, count in runtime.dense_steps.items() if count)
    share = 100 * totals.exact_tokens / max(totals.context_tokens, 1)
    sys.stdout.write(
        f"multipole: {totals.sparse_steps} steps of rows sparse, {totals.dense_steps} dense"
        f"{f' ({reasons})' if reasons else ''}; {share:.1f} % of the context read exactly\n"
    )
    if totals.sparse_steps:
        return 0
    sys.stderr.write(
        "bench-one-batch: multipole attention was asked for and no step was sparse; lengthen "
        "--input-len, or lower min_context\n"
    )
    return 1
