"""The command line: ``python -m flash_attn_sm120 COMMAND``; each command is in ``commands/``."""

from __future__ import annotations

import argparse
import os
import sys

from flash_attn_sm120.commands import (
    check,
    demo,
    doctor,
    explain,
    info,
    prebuild,
    report,
    tune,
    warmup,
)

COMMANDS = (info, check, demo, doctor, explain, report, warmup, tune, prebuild)
PROGRAM = "python -m flash_attn_sm120"
DESCRIPTION = """\
FlashAttention for consumer Blackwell and every NVIDIA GPU since Ampere.

New here? `info` shows what this machine has, `check` tests that results are right on it.
"""


def _name(command: object) -> str:
    return getattr(command, "__name__", "").rpartition(".")[2]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        text = command.__doc__ or ""
        sub = commands.add_parser(
            _name(command), help=text.split("\n")[0], description=text, formatter_class=raw
        )
        command.add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; the exit status."""
    command = None
    try:
        try:
            arguments = _parser().parse_args(argv)
            command = arguments.command
            return int(command.run(arguments))
        finally:  # after --help, too
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as of a program that SIGPIPE ends
    except KeyboardInterrupt:
        return 128 + 2
    except (RuntimeError, OSError) as error:
        print(f"{_name(command)}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
