"""GET /: the chat page. Its files are read once, when the program starts; no request ever names a file."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing from elsewhere, no inline script or style, and no text ever becomes HTML or script."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class File:
    """One file of the page: its bytes, its Content-Type and its entity tag, which changes with the bytes."""

    content: bytes
    media_type: str
    tag: str


def _read() -> dict[str, File]:
    """The page's files by their path on the server."""
    found = {}
    for file in (files("llmlite.serve") / "web").iterdir():
        kind = file.name.rpartition(".")[2]
        if kind in MEDIA_TYPES:
            content = file.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            path = "/" if file.name == "index.html" else f"/web/{file.name}"
            found[path] = File(content, f"{MEDIA_TYPES[kind]}; charset=utf-8", tag)
    return found


FILES = _read()
PATHS = frozenset(FILES)
"""Need no API key: the page itself asks its user for one."""

router = APIRouter(include_in_schema=False)


def _answering(file: File) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that has one file; 304 without a body where the client's copy is still the same."""

    async def page(request: Request) -> Response:
        headers = {**HEADERS, "ETag": file.tag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if file.tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return page


for path, file in FILES.items():
    router.add_api_route(path, _answering(file), methods=["GET", "HEAD"])
