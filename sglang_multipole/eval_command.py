"""`sglang-multipole eval`: accuracy on long-context tasks."""

from __future__ import annotations

HELP = "accuracy on long-context tasks, against any OpenAI-compatible server"


def run(argv: list[str]) -> int:
    """Run the evaluation's own command line; returns the exit code."""
    # its tasks are imported only where they are asked for
    from sglang_multipole.evaluation import command

    return command.main(argv)
