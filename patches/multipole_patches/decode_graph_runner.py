"""Capture two decode graphs a batch size, one with clusters and one without.

Why: a graph does what it was captured with, and a batch without clusters should cost what SGLang's
own attention costs. The method is the place where SGLang lets model runners choose the class.
Versions: 0.5.17.
Removed by: upstream graph variants that an attention backend can ask for.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole.attach import runtime_of

TARGET = "sglang.srt.model_executor.model_runner.ModelRunner._decode_cuda_graph_runner_cls"
TYPE = "after"


def hook(graph_runner: type, runner: Any) -> type | None:
    """The class of the decode graphs.

    Raises:
        RuntimeError: something else has its own class there.
    """
    if runtime_of(runner) is None:
        return None
    from sglang_multipole.graph_runner import MultipoleDecodeGraphRunner

    if not issubclass(MultipoleDecodeGraphRunner, graph_runner):
        raise RuntimeError(
            f"multipole: the decode graphs are {graph_runner.__name__}'s, which cannot be captured "
            "with clusters; remove the plugin that sets it, or leave out --enable-multipole"
        )
    return MultipoleDecodeGraphRunner
