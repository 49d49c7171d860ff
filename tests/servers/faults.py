"""The ways in which a server on loopback gives a file wrongly, or not at all; each is what some real server or proxy has done.

A handler calls `give(fault, body, headers, count)`: count is how often the file has been asked for, so that some faults pass.
"""
from __future__ import annotations

import gzip
import http.server
import threading
from typing import Any

# after a few tries the file comes / it never comes
PASSING = ('fine', 'cut', 'chunked', 'chunked_cut', 'flaky', 'busy', 'range_ignored', 'wrong_range', 'range_refused', 'flipped')
LASTING = ('always_500', 'missing', 'forbidden', 'stall', 'drip', 'cut_always_from_the_start', 'no_length_cut', 'loop', 'to_file',
           'to_private', 'always_flipped', 'gzipped', 'empty')


class Server(http.server.ThreadingHTTPServer):
    """A server that runs in a thread until `close`."""

    daemon_threads, request_queue_size = True, 64
    handler: Any

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), self.handler)
        self.port = self.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.stopping, self.patience = threading.Event(), 1.0       # seconds that a stall lasts
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass    # a client that hangs up is part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers, and gives files through faults."""

    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, code: int, headers: dict[str, str] | None = None, body: bytes = b'') -> None:
        """A whole answer; a header that is '' is left out."""
        self.send_response(code)
        for name, value in {'Content-Length': str(len(body)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
        self.close_connection = True

    def give(self, fault: str, body: bytes, headers: dict[str, str], count: int) -> None:
        """The file, through a fault; ranges are honoured where the fault lets them."""
        getattr(self, fault)(body, headers, count)

    def _start(self, headers: dict[str, str]) -> int:
        span = self.headers['Range'] or ''
        return int(span[6:].split('-')[0]) if span and self.headers['If-Range'] in (None, headers.get('ETag')) else 0

    def fine(self, body: bytes, headers: dict[str, str], count: int = 1, cut: int | None = None) -> None:
        start, total = self._start(headers), len(body)
        end = min(total, int(stop) + 1) if start is not None and (stop := (self.headers['Range'] or '').partition('-')[2]) else total
        if self.headers['Range'] and start >= total:
            self.answer(416)
            return
        is_part = bool(self.headers['Range']) and (start > 0 or self.headers['If-Range'] in (None, headers.get('ETag')))
        headers = {**headers, 'Content-Length': str(end - start)}
        if is_part:
            headers['Content-Range'] = f'bytes {start}-{end - 1}/{total}'
        self.answer(206 if is_part else 200, headers, body[start:end if cut is None else min(end, start + cut)])

    def cut(self, body: bytes, headers: dict[str, str], count: int) -> None:
        """A third of the file at each go."""
        self.fine(body, headers, cut=max(1, len(body) // 3))

    def cut_always_from_the_start(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, {**headers, 'ETag': '', 'Last-Modified': '', 'Content-Length': str(len(body))}, body[:1000])

    def no_length_cut(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, {**headers, 'Content-Length': ''}, body[:len(body) // 2] if count < 3 else body)

    def no_length(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, {**headers, 'Content-Length': ''}, body)

    def chunked(self, body: bytes, headers: dict[str, str], count: int, is_cut: bool = False) -> None:
        self.protocol_version = 'HTTP/1.1'
        self.answer(200, {**headers, 'Content-Length': '', 'Transfer-Encoding': 'chunked', 'Connection': 'close'})
        for start in range(0, len(body), 100_000):
            piece = body[start:start + 100_000]
            self.wfile.write(f'{len(piece):x}\r\n'.encode() + piece + b'\r\n')
            if is_cut:
                return
        self.wfile.write(b'0\r\n\r\n')

    def chunked_cut(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.chunked(body, headers, count, is_cut=count == 1)

    def flaky(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(500) if count < 3 else self.fine(body, headers)

    def busy(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(429, {'Retry-After': '0'}) if count == 1 else self.fine(body, headers)

    def range_ignored(self, body: bytes, headers: dict[str, str], count: int) -> None:
        """After a cut, a range is answered with the whole."""
        self.cut(body, headers, count) if count == 1 else self.answer(200, headers, body)

    def wrong_range(self, body: bytes, headers: dict[str, str], count: int) -> None:
        if self.headers['Range']:
            self.answer(206, {**headers, 'Content-Range': f'bytes 5-{len(body) - 1}/{len(body)}'}, body[5:])
        else:
            self.cut(body, headers, count) if count == 1 else self.fine(body, headers)

    def range_refused(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(416) if self.headers['Range'] else self.cut(body, headers, count) if count == 1 else self.fine(body, headers)

    def flipped(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, headers, body[:-1] + bytes([body[-1] ^ 1])) if count == 1 else self.answer(200, headers, body)

    def always_flipped(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, headers, body[:-1] + bytes([body[-1] ^ 1]))

    def always_500(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(500)

    def missing(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(404)

    def forbidden(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(403)

    def _begin(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, 'Content-Length': str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()

    def stall(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self._begin(body, headers)
        self.wfile.write(body[:1000])
        self.server.stopping.wait(self.server.patience)

    def drip(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self._begin(body, headers)
        for byte in body[:200]:
            self.wfile.write(bytes([byte]))
            if self.server.stopping.wait(self.server.patience / 20):
                return

    def gzipped(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, {**headers, 'Content-Encoding': 'gzip'}, gzip.compress(body))

    def empty(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, headers)

    def huge(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, {**headers, 'Content-Length': str(1 << 40)}, b'x')

    def too_large(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(200, {**headers, 'Content-Length': str(1 << 41)}, b'x')

    def loop(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(302, {'Location': f'{self.path.partition("?")[0]}/{count}'})

    def to_file(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(302, {'Location': 'file:///etc/passwd'})

    def to_signed(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(302, {'Location': 'ftp://host/x?token=secret'})

    def to_private(self, body: bytes, headers: dict[str, str], count: int) -> None:
        self.answer(302, {'Location': 'http://10.255.255.1/x'})
