"""What MkDocs does beyond its plugins.

Files of the repository that pages link to are put beside them, and a search finds an error's sentence before a
docstring that shares words with it.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
_RELATIVE = re.compile(r"\]\((\.\./[^)#\s]+)\)")
_BOOST = {"troubleshooting.md": 4.0, "api/": 0.001}
_log = logging.getLogger("mkdocs.hooks.site")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to `../bench/results/x.jsonl` leads out of `docs/`, which a site has no place for: there it is a copy."""
    for place, boost in _BOOST.items():
        if page.file.src_uri.startswith(place):
            page.meta["search"] = {"boost": boost}
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def beside(link: re.Match[str]) -> str:
        path = posixpath.normpath(f"{folder}/{link[1]}")
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).is_file():
            _log.warning("%s links to %s, which is no file of the repository", page.file.src_uri, link[1])
            return link[0]
        place = f"repository/{path}"
        if place not in files.src_uris:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        return f"]({'../' * page.file.src_uri.count('/')}{place})"

    return _RELATIVE.sub(beside, markdown)
