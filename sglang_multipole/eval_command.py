"""`sglang-multipole eval`: accuracy on long-context tasks; see evaluation/command.py."""

from __future__ import annotations

HELP = "accuracy on long-context tasks, against any OpenAI-compatible server"


def run(argv: list[str]) -> int:
    """Run the evaluation and return its exit code."""
    # the tasks and the client are imported by this subcommand alone
    from sglang_multipole.evaluation import command

    return command.main(argv)
