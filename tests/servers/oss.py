"""Aliyun OSS on loopback, as oss2 speaks to it: checks signatures (V1) and tokens, keeps CRC-64, knows ranges, pages, parts, appends.

`fault` is what reading goes through (faults.py), `put_fault` what writing does; `skew` and `expired` are the store's clock and tokens that
have passed. The tests that use it also run against a real bucket (OSS_TEST_*), which keeps it honest.
"""
from __future__ import annotations

import base64
import hashlib
import hmac
import time
from email.utils import formatdate, parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import oss2.utils

from tests.servers import faults

ID, SECRET, TOKEN = 'LTAI5tForTests', 'a-secret-of-30-characters-at-all', 'sts-token-of-the-tests'
SIGNED = {'uploads', 'uploadId', 'partNumber', 'append', 'position', 'continuation-token', 'security-token'}


class Object:
    """A file of a bucket."""

    def __init__(self, body: bytes, can_grow: bool = False):
        self.body, self.can_grow = body, can_grow
        self.etag = hashlib.md5(body).hexdigest().upper()
        crc = oss2.utils.Crc64()
        crc.update(body)
        self.headers = {'ETag': f'"{self.etag}"', 'x-oss-hash-crc64ecma': str(crc.crc), 'Last-Modified': formatdate(usegmt=True),
                        'x-oss-object-type': 'Appendable' if can_grow else 'Normal'}


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str = 'refused by the tests', **headers: str):
        super().__init__(code)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Handler(faults.Handler):
    server: OssServer

    def _do(self) -> None:
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        bucket, _, key = url.path.lstrip('/').partition('/')
        self.key = unquote(key)
        self.server.requests.append((self.command, self.key))
        size = int(self.headers['Content-Length'] or 0)
        self.body = self.rfile.read(size)
        try:
            if len(self.body) < size:       # the client died on the way
                return
            self._check_signature(bucket)
            if bucket != self.server.bucket:
                raise Refused(404, 'NoSuchBucket')
            getattr(self, f'_{self.command.lower()}')()
        except Refused as error:
            self._refuse(error)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _do

    def _refuse(self, error: Refused) -> None:
        xml = f'<?xml version="1.0"?><Error><Code>{error.code}</Code><Message>{escape(error.message)}</Message></Error>'.encode()
        head = {'x-oss-err': base64.b64encode(xml).decode(), 'Content-Type': 'application/xml', **error.headers}
        self.answer(error.status, head, b'' if self.command == 'HEAD' else xml)

    def _check_signature(self, bucket: str) -> None:
        is_url = 'Signature' in self.query
        given = self.query.get('Signature', '') if is_url else (self.headers['Authorization'] or '').partition(':')[2]
        who = self.query.get('OSSAccessKeyId', '') if is_url else (self.headers['Authorization'] or '')[4:].partition(':')[0]
        date = self.query.get('Expires', '') if is_url else self.headers['Date'] or ''
        token = self.headers['x-oss-security-token'] or self.query.get('security-token')
        if not given:
            raise Refused(403, 'AccessDenied')
        if who != self.server.id:
            raise Refused(403, 'InvalidAccessKeyId', f'The OSS Access Key Id {who} does not exist in our records.')
        own = sorted((k.lower(), v) for k, v in self.headers.items() if k.lower().startswith('x-oss-'))
        resource = f'/{bucket}/{self.key}'
        if below := '&'.join(f'{k}={v}' if v else k for k, v in sorted(self.query.items()) if k in SIGNED):
            resource += f'?{below}'
        text = '\n'.join([self.command, self.headers['Content-MD5'] or '', self.headers['Content-Type'] or '', date,
                          ''.join(f'{k}:{v}\n' for k, v in own) + resource])
        expected = base64.b64encode(hmac.new(self.server.secret.encode(), text.encode(), hashlib.sha1).digest()).decode()
        if not hmac.compare_digest(given, expected):
            raise Refused(403, 'SignatureDoesNotMatch', f'{text} gives another signature than {given}, token {token}')
        now = time.time() + self.server.skew
        if is_url:
            if now > int(date):
                raise Refused(403, 'AccessDenied', 'Request has expired.')
        elif abs(parsedate_to_datetime(date).timestamp() - now) > 900:
            raise Refused(403, 'RequestTimeTooSkewed', Date=formatdate(now, usegmt=True))
        if token != self.server.token:
            raise Refused(403, 'SecurityTokenExpired' if token in self.server.expired else 'InvalidAccessKeyId', f'token {token}')

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.server.skew, usegmt=True)

    def _found(self) -> Object:
        if self.key not in self.server.objects:
            raise Refused(404, 'NoSuchKey')
        return self.server.objects[self.key]

    # ---------------------------------------------------------------- requests
    def _head(self) -> None:
        found = self._found()
        self.answer(200, {**found.headers, 'Content-Length': str(len(found.body)) if found.body else '0'})

    def _get(self) -> None:
        if not self.key:
            self._list()
            return
        found = self._found()
        if self.headers['If-Match'] not in (None, found.headers['ETag']):
            raise Refused(412, 'PreconditionFailed')
        self.server.gets.append((self.key, self.headers['Range']))
        self.give(self.server.fault, found.body, found.headers, sum(key == self.key for key, _ in self.server.gets))

    def _list(self) -> None:
        prefix, after = self.query.get('prefix', ''), self.query.get('continuation-token', '')
        keys = sorted(key for key in list(self.server.objects) if key.startswith(prefix) and key > after)
        page = keys[:min(int(self.query.get('max-keys', 100)), self.server.page)]
        more = f'<NextContinuationToken>{quote(page[-1])}</NextContinuationToken>' if len(page) < len(keys) else ''
        rows = ''.join(f'<Contents><Key>{quote(key, safe="")}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>'
                       f'<ETag>"{self.server.objects[key].etag}"</ETag><Type>Normal</Type><Size>{len(self.server.objects[key].body)}</Size>'
                       '<StorageClass>Standard</StorageClass></Contents>' for key in page)
        xml = (f'<?xml version="1.0"?><ListBucketResult><Name>{self.server.bucket}</Name><Prefix></Prefix><EncodingType>url</EncodingType>'
               f'<IsTruncated>{"true" if more else "false"}</IsTruncated>{more}{rows}</ListBucketResult>')
        self.answer(200, {'Content-Type': 'application/xml'}, xml.encode())

    def _put(self) -> None:
        count = sum(request == ('PUT', self.key) for request in self.server.requests)
        fault, body = self.server.put_fault, self.body
        if self.key.startswith(self.server.refused):
            raise Refused(500, 'InternalError')
        if fault == 'always_500' or (fault == 'flaky' and count < 3):
            raise Refused(500, 'InternalError')
        if fault == 'always_flipped' or (fault == 'flipped' and count == 1):
            body = body[:-1] + bytes([body[-1] ^ 1])
        made = Object(body)
        if 'uploadId' in self.query:
            if self.query['uploadId'] not in self.server.uploads:
                raise Refused(404, 'NoSuchUpload')
            self.server.uploads[self.query['uploadId']][int(self.query['partNumber'])] = made
        else:
            self.server.keep(self.key, made)
        if fault == 'answer_lost' and count == 1:
            self.close_connection = True
            return
        self.answer(200, made.headers)

    def _post(self) -> None:
        if 'uploads' in self.query:
            name = f'upload-{len(self.server.uploads)}'
            self.server.uploads[name] = {}
            xml = f'<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>'
            self.answer(200, {'Content-Type': 'application/xml'}, xml.encode())
        elif 'uploadId' in self.query:
            parts = self.server.uploads.pop(self.query['uploadId'], None)
            asked = [(int(p.findtext('PartNumber')), p.findtext('ETag').strip('"')) for p in ElementTree.fromstring(self.body)]
            if parts is None or [(n, parts[n].etag) for n in sorted(parts)] != asked:
                raise Refused(400, 'InvalidPart')
            made = Object(b''.join(parts[n].body for n in sorted(parts)))
            self.server.keep(self.key, made)
            self.answer(200, made.headers)
        elif 'append' in self.query:
            self._append()
        else:
            raise Refused(400, 'InvalidArgument')

    def _append(self) -> None:
        if self.server.overtaken:
            self.server.objects[self.key], self.server.overtaken = Object(self.server.overtaken, can_grow=True), b''
        self.server.received[self.key] = self.server.received.get(self.key, 0) + len(self.body)
        if self.key.startswith(self.server.refused):
            raise Refused(500, 'InternalError')
        old = self.server.objects.get(self.key, Object(b'', can_grow=True))
        if not old.can_grow:
            raise Refused(409, 'ObjectNotAppendable')
        if int(self.query['position']) != len(old.body):
            raise Refused(409, 'PositionNotEqualToLength', **{'x-oss-next-append-position': str(len(old.body))})
        made = Object(old.body + self.body, can_grow=True)
        self.server.keep(self.key, made)
        if self.server.put_fault == 'answer_lost' and not old.body:
            self.close_connection = True
            return
        self.answer(200, {**made.headers, 'x-oss-next-append-position': str(len(made.body))})

    def _delete(self) -> None:
        if 'uploadId' in self.query:
            self.server.uploads.pop(self.query['uploadId'], None)
        else:
            self.server.objects.pop(self.key, None)
        self.answer(204, {'Content-Length': ''})


class OssServer(faults.Server):
    """One bucket. `history` notes each key in the order in which it appeared whole."""

    handler = Handler

    def __init__(self, bucket: str = 'bucket') -> None:
        self.bucket, self.objects = bucket, {}
        self.id, self.secret, self.token = ID, SECRET, None
        self.expired: set[str] = set()
        self.refused: tuple[str, ...] = ()      # beginnings of keys that cannot be written
        self.skew, self.fault, self.put_fault, self.page = 0.0, 'fine', 'fine', 1000
        self.uploads: dict[str, dict[int, Any]] = {}
        self.overtaken = b''                    # what another has made of the file when the next append arrives
        self.received: dict[str, int] = {}      # bytes that appends have brought, by key
        self.requests: list[tuple[str, str]] = []
        self.gets: list[tuple[str, str | None]] = []
        self.history: list[str] = []
        super().__init__()

    def keep(self, key: str, made: Object) -> None:
        """Let a file appear."""
        self.objects[key] = made
        self.history.append(key)

    def enter(self, monkeypatch: Any) -> None:
        """Put its endpoint and keys into the environment."""
        for name, value in {'OSS_ENDPOINT': self.url, 'OSS_ACCESS_KEY_ID': ID, 'OSS_ACCESS_KEY_SECRET': SECRET}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv('OSS_SESSION_TOKEN', raising=False)
