"""One HTML file a run: what was made from what, whether it looks right, how good it is, what failed, what it cost.

`collect` reads the store into plain values and `report.html.j2` shows them. What is missing is None and shows as a
dash, so a farm half done has a report too. Pictures travel inside the file, and it loads nothing: however many concepts
there are, they share what `PAGE_BYTES` leaves them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jinja2

from farm.plan import Plan
from farm.report import formats
from farm.report.collect import collect
from farm.store import Store

PAGE_BYTES = 4_900_000
SAID_BYTES = 3_500
"""What is said of a concept takes about so much; it only decides at which size pictures are read."""
LEAST_SHARE = 0.3
"""Of a page's bytes that its pictures get whatever there is to be said: with some thousand concepts it is larger."""
FOLDER = Path(__file__).parent


def build_report(store: Store, plan: Plan, *, failures: Mapping[str, str], stage_seconds: Mapping[str, float]) -> bytes:
    """The report as HTML in UTF-8, of whatever the store holds of the plan.

    Args:
        failures: concept (or stage) to the reason it failed in this run.
        stage_seconds: wall seconds of this run by stage, named as in `farm.report.collect.STAGES`; others get rows of
            their own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(formats.FILTERS)
    script = (FOLDER / "report.js").read_text()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    room = _room(SAID_BYTES * len(plan.config.catalogue))
    facts = collect(store, plan, failures=failures, stage_seconds=stage_seconds, picture_bytes=room)
    template = environment.get_template("report.html.j2")
    facts |= {"script": script, "script_sha256": allowed, "style": (FOLDER / "report.css").read_text()}
    said = len(template.render(facts).encode())
    facts["album"].develop(_room(said))
    return template.render(facts).strip().encode()


def _room(said: int) -> int:
    """The bytes that pictures may have beside so many of text; base64 makes four characters of three."""
    return int(max(PAGE_BYTES - said, LEAST_SHARE * PAGE_BYTES) * 3 / 4)
