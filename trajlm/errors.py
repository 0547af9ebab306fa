"""The one exception users see: what was expected, what came, and what to do."""

from __future__ import annotations

from pathlib import Path

MOST_SHOWN = 200  # characters of what was found in a file; an error stays one readable line


class TrajlmError(Exception):
    """A mistake in the input or the settings, told in one line.

    Scripts print the message and exit with status 2; a traceback only with ``--debug``.
    """


class SharedError(TrajlmError):
    """A mistake that every process of a run raises at the same moment; the first of them tells it."""


class UnexpectedInput(TrajlmError):  # noqa: N818 - it says what happened
    """A file is not what the cohort expects.

    Args:
        file: the file as the user would open it (a member of an archive as ``archive/member``).
        expected: what the reader needs there.
        came: what it found.
        line: 1-based line in that file, the header being line 1; ``None`` if the file as a whole is meant.
        column: the column's name, if one is meant.
        hint: what to do about it.
    """

    def __init__(
        self,
        file: Path | str,
        *,
        expected: str,
        came: str,
        line: int | None = None,
        column: str | None = None,
        hint: str | None = None,
    ) -> None:
        where = str(file)
        if line is not None:
            where += f", line {line}"
        if column is not None:
            where += f", column {column}"
        if len(came) > MOST_SHOWN:
            came = f"{came[:MOST_SHOWN]}... ({len(came)} characters)"
        message = f"{where}: expected {expected}, came {came}"
        if hint:
            message += f"; {hint}"
        super().__init__(" ".join(message.split()))
        self.file, self.line, self.column = str(file), line, column
