"""The drawing page's files, read once at start: they are few and small, and no path of a client's reaches the disk."""

import hashlib
import mimetypes
from pathlib import Path
from typing import Final, NamedTuple

PAGE_FOLDER: Final = Path(__file__).with_name("page")

_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


class PageFile(NamedTuple):
    """A file's bytes, its content type and its entity tag."""

    body: bytes
    content_type: bytes
    etag: bytes


def read_page(folder: Path = PAGE_FOLDER) -> dict[str, PageFile]:
    """All files below ``folder`` by their path in it, such as ``index.html``; hidden files and Python's left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix != ".py" and not any(part.startswith((".", "_")) for part in name.split("/")):
            body = path.read_bytes()
            kind = _TYPES.get(path.suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
            found[name] = PageFile(body, kind.encode(), b'"%s"' % hashlib.sha256(body).hexdigest()[:20].encode())
    return found
