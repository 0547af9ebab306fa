"""Puts a page together: one HTML file that holds its styles, scripts and data, and loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trajlm.errors import TrajlmError

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, shared: dict[str, Any], scripts: Sequence[str], **values: Any) -> str:
    """A page of ``templates/`` as HTML; everything in ``values`` is escaped, but for our own script and style.

    Args:
        template: its file.
        shared: what the page's scripts read: ``figures`` by key among it.
        scripts: files of ``templates/`` to run, in order, after Plotly.
        values: what else the template shows.
    """
    texts = [_script(get_plotlyjs()), *(_script((TEMPLATES / name).read_text(encoding="utf-8")) for name in scripts)]
    return render_still(
        template,
        scripts=texts,
        # Only scripts of exactly these contents may run: markup that slipped in from a record could not.
        script_hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in texts),
        shared=inline_json(shared),
        **values,
    )


def render_still(template: str, **values: Any) -> str:
    """A page of ``templates/`` that needs no script of its own, as HTML; everything in ``values`` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def inline_json(value: Any) -> Markup:
    """JSON that may stand inside a script element: no character in it can open or close markup."""
    text = json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _script(text: str) -> Markup:
    """Our own script, made safe to stand inline; the browser hashes it exactly as it stands."""
    if "</script" in text.lower() or "<!--" in text:
        raise TrajlmError("a script of the report cannot be inlined: it holds the end of a script element")
    return Markup(text)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
