"""http:// and https:// addresses, with the standard library alone."""

from __future__ import annotations

import base64
import http.client
import io
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit

from scepter.core.errors import DataError
from scepter.core.registry import FILE_SYSTEMS
from scepter.core.schema import param
from scepter.core.stores.client import FileClient, Kind, Transient, is_public_only, need_space, reason, receive, shown
from scepter.core.stores.guard import public_handlers

TRANSIENT = (408, 425, 429, 500, 502, 503, 504, 507, 509)


@FILE_SYSTEMS.register_class()
class HttpFs(FileClient):
    """Files of web servers, read only. A broken transfer goes on where it broke, if the server can prove the file is the same."""

    schemes: tuple[str, ...] = ('http', 'https')

    TIMEOUT: float = param(9.0, 'Seconds without an answer after which a server counts as stalled.', above=0)
    REDIRECTS: int = param(5, 'Redirects that are followed.', least=0)
    LARGEST: int = param(1 << 40, 'Bytes of the largest file that is fetched.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self._open, self._open_public = self._opener(), self._opener(*public_handlers())
        self._validators: dict[Path, str] = {}      # of files on their way: what proves that the rest belongs to the beginning

    def _opener(self, *handlers: urllib.request.BaseHandler) -> Callable[..., Any]:
        redirects = _Redirects()
        redirects.max_redirections = self.REDIRECTS      # type: ignore[misc]
        return urllib.request.build_opener(redirects, *handlers).open

    def stamp(self, path: str) -> str:
        try:
            with self._request(path, method='HEAD') as answer:
                return str((answer.headers['ETag'], answer.headers['Last-Modified'], answer.headers['Content-Length']))
        except Refused as error:
            if error.code in (404, 410):
                raise
            return ''       # a server that does not answer HEAD may well answer GET

    def kind(self, path: str) -> Kind | None:
        try:
            with self._request(path, method='HEAD'):
                return 'file'
        except Refused as error:
            if error.code in (404, 410):
                return None
            raise

    def size(self, path: str) -> int:
        with self._request(path, method='HEAD') as answer:
            if not answer.headers.get('Content-Length', '').isdigit():
                raise DataError(f'{shown(path)}: the server tells no length')
            return int(answer.headers['Content-Length'])

    def read(self, path: str, start: int, size: int) -> bytes:
        if size < 1:
            return b''
        try:
            with self._request(path, {'Range': f'bytes={start}-{start + size - 1}'}) as answer:
                span = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+|\*)', answer.headers.get('Content-Range', ''))
                if answer.status != 206 or not span or int(span[1]) != start or int(span[2]) >= start + size:
                    raise DataError(f'{shown(path)}: bytes from {start} on were asked for, the server cannot send a part alone')
                data = io.BytesIO()
                receive(answer.read1, data, self.TIMEOUT)
        except Refused as error:
            if error.code == 416:       # it ends before start
                return b''
            raise
        if len(found := data.getvalue()) != int(span[2]) + 1 - start:
            raise Transient(f'{int(span[2]) + 1 - start} bytes expected, {len(found)} received')
        return found

    def url(self, path: str, seconds: int) -> str:
        return path

    def get(self, path: str, target: Path) -> bool:
        done = target.stat().st_size if target.exists() else 0
        validator = self._validators.get(target, '')
        headers = {'Range': f'bytes={done}-', 'If-Range': validator} if done and validator else {}
        try:
            with self._request(path, headers) as answer:
                return self._receive(path, answer, target, done if headers else 0)
        except Refused as error:
            if error.code != 416:
                raise
            target.unlink(missing_ok=True)
            raise Transient('the server cannot go on where the transfer broke') from error

    def _receive(self, path: str, answer: Any, target: Path, done: int) -> bool:
        if answer.headers.get('Content-Encoding', 'identity') != 'identity':
            raise DataError(f'{shown(path)}: the server answers {answer.headers["Content-Encoding"]}-encoded, although asked not to')
        if answer.status == 206:
            span = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+)', answer.headers.get('Content-Range', ''))
            if not span or int(span[1]) != done or int(span[2]) + 1 != int(span[3]):
                target.unlink(missing_ok=True)
                raise Transient(f'bytes from {done} on were asked for, the server sends {answer.headers.get("Content-Range")}')
            total: int | None = int(span[3])
        else:
            done = 0
            total = int(answer.headers['Content-Length']) if answer.headers.get('Content-Length', '').isdigit() else None
        etag = answer.headers.get('ETag', '')
        self._validators[target] = etag if etag.startswith('"') else answer.headers.get('Last-Modified', '')
        if total is not None:
            self._within(path, total, 0)
            need_space(path, target.parent, total - done)
        with open(target, 'r+b' if done else 'wb') as file:
            file.seek(done)
            receive(lambda size: answer.read1(self._within(path, file.tell(), size)), file, self.TIMEOUT)
            found = file.tell()
        if total is not None and found != total:
            if found > total:
                target.unlink()
            raise Transient(f'{total} bytes expected, {found} received')
        self._validators.pop(target, None)
        return total is not None or answer.chunked      # the end of a chunked body is marked, so a cut one does not get here

    def _within(self, path: str, found: int, more: int) -> int:
        """How many more bytes to read. Raises DataError where there are too many already."""
        if found > self.LARGEST:
            raise DataError(f'{shown(path)}: more than the {self.LARGEST:,} bytes that LARGEST allows')
        return more

    def _private_headers(self) -> dict[str, str]:
        """Headers that are for the asked host alone, and not for where it redirects to."""
        return {}

    def _request(self, path: str, headers: dict[str, str] | None = None, method: str = 'GET') -> Any:
        try:
            parts = urlsplit(path)
        except ValueError as error:
            raise DataError(f'{path!r:.80}: not a web address') from error
        user, _, host = parts.netloc.rpartition('@')
        url = quote(parts._replace(netloc=host, fragment='').geturl(), safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(url, method=method,
                                         headers={'Accept-Encoding': 'identity', 'User-Agent': 'scepter', **(headers or {})})
        if user:
            request.add_unredirected_header('Authorization', 'Basic ' + base64.b64encode(unquote(user).encode()).decode())
        for name, value in self._private_headers().items():    # unredirected: they, and the password, are for this host alone
            request.add_unredirected_header(name, value)
        try:
            return (self._open_public if is_public_only.get() else self._open)(request, timeout=self.TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in TRANSIENT:
                wait = error.headers.get('Retry-After', '')
                raise Transient(f'{error.code} {error.reason}', float(wait) if wait.isdigit() else None) from error
            # urllib's own words about a redirect hold the new address, which may be signed
            why = 'redirects without end, or to an address that is refused' if 300 <= error.code < 400 else error.reason
            raise Refused(f'{shown(path)}: {error.code} {why}', error.code) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise DataError(f'{shown(path)}: {error.reason}') from error
            raise Transient(reason(error.reason)) from error
        except (ValueError, http.client.InvalidURL) as error:
            raise DataError(f'{shown(path)}: not a web address') from error
        except (OSError, http.client.HTTPException) as error:
            raise Transient(reason(error)) from error


class Refused(DataError):
    """An answer that is final."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage,
                         newurl: str) -> urllib.request.Request | None:
        schemes = ('https',) if req.type == 'https' else ('http', 'https')
        if urlsplit(newurl).scheme not in schemes:
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        if (request := super().redirect_request(req, fp, code, msg, headers, newurl)) is not None:
            request.method = req.get_method()       # a HEAD stays a HEAD
        return request
