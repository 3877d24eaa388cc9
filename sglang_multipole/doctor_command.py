"""`sglang-multipole doctor [flags of serve]`: what would be refused, before a long start."""

from __future__ import annotations

import sys

from sglang_multipole.server_arguments import read_given

HELP = "say what would keep a server from starting, given the flags of `serve`"
ENABLE = "--enable-multipole"
USAGE = f"""\
usage: sglang-multipole doctor [--model-path MODEL] [flags of `sglang-multipole serve`]

{HELP}; exit code 0 if nothing, else 1.
Without {ENABLE} or the backend's name among the flags, {ENABLE} is added.
"""


def run(argv: list[str]) -> int:
    """Print the findings; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(USAGE)
        return 0
    given = read_given(argv)
    names = ("attention_backend", "decode_attention_backend")
    if "enable_multipole" not in given and "multipole" not in [given.get(n) for n in names]:
        argv = [*argv, ENABLE]
    return report(argv)


def report(argv: list[str]) -> int:
    """Print the findings for exactly these flags; returns the exit code."""
    from sglang_multipole import doctor

    num_bad = 0
    for finding in doctor.examine(argv):
        num_bad += not finding.is_ok
        sys.stdout.write(
            f"{'ok  ' if finding.is_ok else 'FAIL'}  {finding.subject}: {finding.detail}\n"
        )
        sys.stdout.flush()
    sys.stdout.write("a server can be started\n" if not num_bad else f"{num_bad} to be put right\n")
    return 1 if num_bad else 0
