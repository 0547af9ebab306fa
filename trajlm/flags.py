"""The command line of every script: a recipe's keys as flags, its mistakes as one line."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser

from trajlm.config import Recipe, from_dict, is_section, valid_keys
from trajlm.errors import SharedError, TrajlmError


class PlainParser(argparse.ArgumentParser):
    """Parses flags of a command that takes no recipe; a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a TrajlmError, which says where more is told."""
        raise TrajlmError(f"{message} ({self.prog} --help tells them all)")


class Parser(ArgumentParser):
    """Parses flags and YAML; every mistake is one line that names the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a TrajlmError, with a suggestion where a key is not known."""
        raise TrajlmError(_with_suggestion(message)) from ex


_UNKNOWN_KEY = re.compile(
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[\w.]+)'"
    r"|(?:unrecognized arguments: --|[Kk]ey |[Oo]ption )'?(?P<flag>[\w.-]+)'?"
)
_LIST = re.compile(r"[\"'](?P<key>[\w.]+)[\"'].*Expected a <class 'list'>\. Got value: (?P<value>.+)")
_OFF = re.compile(r"[\"'](?P<key>[\w.]+)[\"'].*'off'.*Got value: False")


def _with_suggestion(message: str) -> str:
    first = " ".join(message.split())
    listed = _LIST.search(first)
    if listed:
        items = ", ".join(listed["value"].replace(",", " ").split())
        return f"{listed['key']} is a list, came {listed['value']}; write --{listed['key']} '[{items}]'"
    off = _OFF.search(first)
    if off:
        return f"{off['key']}: a bare off is false in YAML; write 'off'"
    found = _UNKNOWN_KEY.search(first)
    if not found:
        return first
    group, option = found["group"], found["option"] or found["flag"]
    key = option if group is None or option.startswith(group) else f"{group}.{option}"
    nearest = difflib.get_close_matches(key.replace("-", "_"), valid_keys(), n=1, cutoff=0.0)[0]
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
    given = list(sys.argv[1:] if arguments is None else arguments)
    for word in given:
        if word.startswith("--prepare."):
            flag = word.partition("=")[0].removeprefix("--prepare.").replace("_", "-")
            raise TrajlmError(f"{word.partition('=')[0]} is read by `trajlm prepare` alone, as --{flag}")
    for file in _configs(given):
        _require_sections(file)
    parsed = parser.parse_args(given).clone()
    for name in ("config", "debug"):
        parsed.pop(name, None)
    return from_dict(Recipe, parsed.as_dict())


def _configs(given: Sequence[str]) -> list[Path]:
    named = [word.removeprefix("--config=") for word in given if word.startswith("--config=")]
    named += [value for word, value in itertools.pairwise(given) if word == "--config"]
    return [Path(name) for name in named if Path(name).is_file()]


def _require_sections(file: Path) -> None:
    """Raise TrajlmError for a recipe that holds nothing, or a section that holds no keys."""
    try:
        read = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # the parser tells what is wrong
    if not isinstance(read, dict):
        raise TrajlmError(f"{file}: expected keys of a recipe and their values, came {read or 'an empty file'}")
    for name, held in read.items():
        if is_section(name) and not isinstance(held, dict):
            came = "nothing; leave it out" if held is None else repr(held)
            raise TrajlmError(f"{file}: section {name}: expected keys and values, came {came}")


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
