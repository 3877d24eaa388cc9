"""The command `sglang-multipole`: its subcommands are one module each."""

from __future__ import annotations

import argparse
import sys

from sglang_multipole import (
    bench_one_batch_command,
    check_command,
    demo_model_command,
    doctor_command,
    eval_command,
    serve_command,
    top_command,
)

COMMANDS = {"top": top_command, "check": check_command, "demo-model": demo_model_command}
# these parse their own arguments; of SGLang's flags no parser of ours must know
OWN_PARSER_COMMANDS = {
    "serve": serve_command,
    "doctor": doctor_command,
    "eval": eval_command,
    "bench-one-batch": bench_one_batch_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="sglang-multipole", description="Multipole Attention for SGLang."
    )
    subcommands = parser.add_subparsers(dest="subcommand", required=True)
    for name, command in OWN_PARSER_COMMANDS.items():
        subcommands.add_parser(name, help=command.HELP, add_help=False)
    for name, command in COMMANDS.items():
        command.add_arguments(subcommands.add_parser(name, help=command.HELP))
    if argv and argv[0] in OWN_PARSER_COMMANDS:
        return OWN_PARSER_COMMANDS[argv[0]].run(argv[1:])
    arguments = parser.parse_args(argv)
    return COMMANDS[arguments.subcommand].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
