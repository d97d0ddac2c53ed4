"""`drt`: parse the command, run it, and say errors in one line."""

from __future__ import annotations

import argparse
import os
import sys

from drt.cli import ask, data, demo, evaluate, generate, memory, read, study, train

COMMANDS = (demo, data, train, evaluate, study, read, ask, generate, memory)


def parser() -> argparse.ArgumentParser:
    """The command line of every subcommand."""
    top = argparse.ArgumentParser(
        prog="drt", description="Language models with learned causal retrieval."
    )
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = subparsers.add_parser(
            command.NAME, help=command.HELP, description=command.HELP, epilog=command.EPILOG
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return top


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; overrides may stand between and after options too."""
    top = parser()
    # argparse gives its positional list only what stands before the first option.
    options, rest = top.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run `drt`; the exit code is 2 for a user's error and 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        options.run(options)
    except BrokenPipeError:
        # Whoever read the output has had enough, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"drt {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ndrt {options.command}: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
