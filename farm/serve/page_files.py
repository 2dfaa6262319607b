"""The web page: static files, served with headers that let them do no more than they need."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import FastAPI, Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
    ".png": "image/png",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
}


def add_page(app: FastAPI) -> None:
    """Add `/`, which is `page/index.html`, and the other files of that folder under `/page/`."""
    folder = resources.files("farm.serve").joinpath("page")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if _suffix(file.name) in TYPES}
    secure = security_headers(files["index.html"].decode())

    def answer(name: str) -> Response:
        headers = {**secure, "Cache-Control": "no-cache"}
        return Response(files[name], media_type=TYPES[_suffix(name)], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answer("index.html")

    for name in files.keys() - {"index.html"}:
        app.add_api_route(f"/page/{name}", lambda name=name: answer(name), include_in_schema=False)


def security_headers(page: str) -> dict[str, str]:
    """For the page and its files: nothing from elsewhere, and of what stands in the page itself only this."""
    scripts, styles = (" ".join(["'self'", *map(_hash, _inline(page, tag))]) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src 'self' blob: data:; "
        "connect-src 'self'; media-src 'self' blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


def _inline(page: str, tag: str) -> list[str]:
    return [text for text in re.findall(rf"<{tag}(?:\s[^>]*)?>(.*?)</{tag}>", page, re.DOTALL) if text]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _suffix(name: str) -> str:
    return name[name.rfind(".") :] if "." in name else ""
