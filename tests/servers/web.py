"""A web server on loopback: BODY at every path, through the fault that the path's first folder names; `gets` notes each request for it."""
from __future__ import annotations

import hashlib
from typing import Any

from tests.servers import faults

BODY = bytes(range(256)) * 3000      # 768,000 bytes
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(faults.Handler):
    server: WebServer

    def do_HEAD(self) -> None:
        fault = self.path.split('/')[1]
        if fault in ('missing', 'refused'):
            self.answer(404 if fault == 'missing' else 405)
        elif fault == 'gone-away':
            self.close_connection = True
        else:
            body = self.server.files.get(self.path, self.server.body)
            self.answer(200, {'ETag': self.server.etag, 'Content-Length': str(len(body))})

    def do_GET(self) -> None:
        self.server.gets.append((self.path, self.headers['Range'], self.headers['Authorization']))
        fault, path = self.path.split('/')[1].partition('?')[0].replace('-', '_'), self.path.partition('?')[0]
        count = sum(p.partition('?')[0] == path for p, _, _ in self.server.gets)
        self.give(fault, self.server.files.get(self.path, self.server.body), {'ETag': self.server.etag}, count)

    def cut_then_changed(self, body: bytes, headers: dict[str, str], count: int) -> None:
        """After the first cut the file is another one: a beginning must not be joined to its end."""
        is_joined = self.headers['Range'] and self.headers['If-Range'] in (None, '"two"')
        if count == 1 or is_joined:
            self.cut(body, {'ETag': '"two"' if is_joined else '"one"'}, count)
        else:
            self.answer(200, {'ETag': '"two"'}, b'other')

    def refused(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.fine(body, headers)

    gone_away = refused

    def moved(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(302, {'Location': f'http://localhost:{self.server.port}/fine/moved'})


class WebServer(faults.Server):
    """`files` gives other bodies than BODY by their paths."""

    handler = Handler

    def __init__(self) -> None:
        self.gets: list[tuple[str, str | None, str | None]] = []
        self.etag, self.body = '"one"', BODY
        self.files: dict[str, Any] = {}
        super().__init__()
