"""The command line of every script: a recipe's keys as flags, its mistakes as one line."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser

from trajlm.config import Recipe, from_dict, valid_keys
from trajlm.errors import SharedError, TrajlmError


class Parser(ArgumentParser):
    """Parses flags and YAML; every mistake is one line that names the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a TrajlmError, with a suggestion where a key is not known."""
        raise TrajlmError(_with_suggestion(message)) from ex


_UNKNOWN_KEY = re.compile(
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[\w.]+)'"
    r"|(?:unrecognized arguments: --|[Kk]ey |[Oo]ption )'?(?P<flag>[\w.]+)'?"
)


def _with_suggestion(message: str) -> str:
    first = " ".join(message.split())
    found = _UNKNOWN_KEY.search(first)
    if not found:
        return first
    group, option = found["group"], found["option"] or found["flag"]
    key = option if group is None or option.startswith(group) else f"{group}.{option}"
    nearest = difflib.get_close_matches(key, valid_keys(), n=1, cutoff=0.0)[0]
    return f"{key!r} is not a setting; the nearest is {nearest!r}"


def recipe_parser(program: str, description: str) -> Parser:
    """A parser whose flags are the recipe's keys, whose ``--config`` reads a recipe, whose ``--help`` explains both."""
    parser = Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="recipe, a YAML file; flags after it override its keys")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    parser.add_class_arguments(Recipe, None)
    return parser


def parse_recipe(parser: Parser, arguments: Sequence[str] | None = None) -> Recipe:
    """Flags and YAML to a checked recipe."""
    parsed = parser.parse_args(arguments).clone()
    for name in ("config", "debug"):
        parsed.pop(name, None)
    return from_dict(Recipe, parsed.as_dict())


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run a script's main function: errors are one line and status 2, a traceback only with ``--debug``."""
    try:
        command()
    except TrajlmError as error:
        if "--debug" in sys.argv:
            raise
        if not isinstance(error, SharedError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        said = " ".join(str(error).split())[:500]
        print(f"error: {type(error).__name__}: {said} (--debug prints the traceback)", file=sys.stderr)
        sys.exit(1)
    distributed = sys.modules.get("torch.distributed")  # not imported for this: most commands need no torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads end before the interpreter does, which they could abort
    sys.exit(0)
