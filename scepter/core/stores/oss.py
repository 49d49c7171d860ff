"""Aliyun OSS: oss://bucket/key, through oss2. Every file is compared with the CRC-64 that the store keeps, on its way there and back."""

from __future__ import annotations

import configparser
import logging
import os
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from scepter.core.errors import DataError
from scepter.core.registry import FILE_SYSTEMS, need
from scepter.core.schema import param
from scepter.core.secrets import hide, note_secrets
from scepter.core.stores.client import FileClient, Kind, Transient, need_space, reason, receive

T = TypeVar('T')
TRANSIENT = (408, 425, 429)
OF_THE_KEYS = ('InvalidAccessKeyId', 'SignatureDoesNotMatch', 'InvalidSecurityToken')


class _StartOver(Transient):
    """What has come so far is of no use."""


class Keys(NamedTuple):
    """Who asks, and where that was found."""

    id: str
    secret: str
    token: str
    endpoint: str
    source: str

    def __repr__(self) -> str:
        return f'Keys(from {self.source})'


@FILE_SYSTEMS.register_class()
class AliyunOssFs(FileClient):
    """Buckets of Aliyun OSS. Keys come from the config, else OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET and OSS_SESSION_TOKEN, else
    ~/.ossutilconfig; without any, public buckets can be read. Better leave them out of a config."""

    schemes = ('oss',)

    ENDPOINT: str | None = param(None, 'Where the region answers, e.g. https://oss-cn-hangzhou.aliyuncs.com; default $OSS_ENDPOINT.')
    BUCKET: str | None = param(None, 'The bucket whose addresses this client serves; default all.')
    PREFIX: str = param('', 'Beginning of the keys that this client serves, in its BUCKET.')
    OSS_AK: str | None = param(None, 'Access key id.')
    OSS_SK: str | None = param(None, 'Access key secret.')
    OSS_TOKEN: str | None = param(None, 'Security token of keys that pass (STS).')
    WRITABLE: bool = param(True, 'Whether anything may be written or removed.')
    TIMEOUT: float = param(9.0, 'Seconds without an answer after which the store counts as stalled.', above=0)
    PART_SIZE: int = param(1 << 26, 'Bytes of a part; a longer file is sent in parts.', least=100 << 10)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        note_secrets(self.cfg)
        self._buckets: dict[tuple[int, str], Any] = {}
        self._etags: dict[Path, str] = {}       # of files on their way
        self._keys: Keys | None = None

    @property
    def prefixes(self) -> list[str]:
        return [f'oss://{self.BUCKET}/{self.PREFIX.lstrip("/")}'] if self.BUCKET else super().prefixes

    # ---------------------------------------------------------------- reading
    def stamp(self, path: str) -> str:
        head = self._do(path, lambda bucket, key: bucket.head_object(key))
        return str((head.etag, head.content_length, head.server_crc))

    def get(self, path: str, target: Path) -> bool:
        head = self._do(path, lambda bucket, key: bucket.head_object(key))
        size = head.content_length
        done = target.stat().st_size if target.exists() and self._etags.get(target) == head.etag else 0
        self._etags[target] = head.etag
        need_space(path, target.parent, size - done)
        if done < size or not size:
            try:
                self._do(path, lambda bucket, key: self._receive(bucket, key, head, target, done))
            except _StartOver:
                target.unlink(missing_ok=True)
                raise
        found = target.stat().st_size
        if found != size:
            if found > size:
                target.unlink()
            raise Transient(f'{size} bytes expected, {found} received')
        if head.server_crc is not None and (crc := crc64(target)) != head.server_crc:
            target.unlink()
            raise Transient(f'crc64 {head.server_crc} expected, {crc} found')
        self._etags.pop(target, None)
        return True

    def _receive(self, bucket: Any, key: str, head: Any, target: Path, done: int) -> None:
        answer = bucket.get_object(key, byte_range=(done, None) if done else None, headers={'If-Match': f'"{head.etag}"'})
        with answer, open(target, 'r+b' if done else 'wb') as file:
            if answer.status == 206:
                expected = f'bytes {done}-{head.content_length - 1}/{head.content_length}'
                if answer.content_range != expected:
                    raise _StartOver(f'{expected} were asked for, the store sends {answer.content_range}')
                file.seek(done)
            else:
                file.truncate(0)
            receive(lambda size: answer.resp.response.raw.read1(size, decode_content=False), file, self.TIMEOUT)

    def read(self, path: str, start: int, size: int) -> bytes:
        def part(bucket: Any, key: str) -> bytes:
            with bucket.get_object(key, byte_range=(start, start + size - 1), headers={'x-oss-range-behavior': 'standard'}) as answer:
                data = answer.read()
                if answer.status != 206 or not (answer.content_range or '').startswith(f'bytes {start}-{start + len(data) - 1}/'):
                    raise Transient(f'{size} bytes from {start} on were asked for, the store sends {len(data)}, {answer.content_range}')
                return data

        end = self.size(path)
        size = max(0, min(size, end - start))
        return self._do(path, part) if size else b''

    def size(self, path: str) -> int:
        return self._do(path, lambda bucket, key: bucket.head_object(key)).content_length

    def kind(self, path: str) -> Kind | None:
        def look(bucket: Any, key: str) -> Kind | None:
            try:
                if key and not key.endswith('/'):
                    bucket.head_object(key)
                    return 'file'
            except self._oss2().exceptions.NotFound:      # of a bucket as well, which the listing tells
                pass
            found = bucket.list_objects_v2(key.rstrip('/') + '/' if key else '', max_keys=1).object_list
            return 'folder' if found or not key else None

        return self._do(path, look)

    def list(self, path: str) -> list[str]:
        def names(bucket: Any, key: str) -> list[str]:
            below, token, found = key.rstrip('/') + '/' if key else '', '', []
            while True:
                page = bucket.list_objects_v2(below, continuation_token=token, max_keys=1000)
                found += [item.key for item in page.object_list]
                token = page.next_continuation_token
                if not page.is_truncated:
                    return sorted(name[len(below):] for name in found if not name.endswith('/'))

        found = self._do(path, names)
        if not found and self.kind(path) is None:
            raise DataError(f'{path}: does not exist')
        return found

    def url(self, path: str, seconds: int) -> str:
        return self._do(path, lambda bucket, key: bucket.sign_url('GET', key, seconds, slash_safe=True))

    # ---------------------------------------------------------------- writing
    def put(self, source: Path, path: str) -> None:
        self._refuse_writing(path)
        size = source.stat().st_size
        self._do(path, lambda bucket, key: (self._put_parts if size > self.PART_SIZE else self._put_whole)(bucket, key, source))
        head = self._do(path, lambda bucket, key: bucket.head_object(key))
        if (head.content_length, head.server_crc) != (size, crc := crc64(source)):
            raise Transient(f'{size} bytes of crc64 {crc} were sent, the store has {head.content_length} of {head.server_crc}')

    def _put_whole(self, bucket: Any, key: str, source: Path) -> None:
        with open(source, 'rb') as file:
            bucket.put_object(key, file)

    def _put_parts(self, bucket: Any, key: str, source: Path) -> None:
        oss2, parts = self._oss2(), []
        upload = bucket.init_multipart_upload(key).upload_id
        try:
            size = source.stat().st_size
            with open(source, 'rb') as file:
                for number, start in enumerate(range(0, size, self.PART_SIZE), 1):
                    length = min(self.PART_SIZE, size - start)
                    sent = bucket.upload_part(key, upload, number, oss2.SizedFileAdapter(file, length))
                    parts.append(oss2.models.PartInfo(number, sent.etag, size=length))
            bucket.complete_multipart_upload(key, upload, parts)
        except BaseException:
            try:
                bucket.abort_multipart_upload(key, upload)
            except oss2.exceptions.OssError:    # the bucket's own rules clear it away; what broke first is what to tell
                pass
            raise

    def extend(self, source: Path, path: str) -> None:
        self._refuse_writing(path)
        self._do(path, lambda bucket, key: self._append(bucket, key, source, source.stat().st_size))

    def _append(self, bucket: Any, key: str, source: Path, size: int) -> None:
        """What is there is gone on from if it is the beginning of the file, and can grow; else it is made anew."""
        oss2 = self._oss2()
        try:
            head = bucket.head_object(key)
            done = head.content_length
            if head.object_type != 'Appendable' or done > size or head.server_crc != crc64(source, done):
                bucket.delete_object(key)
                done = 0
        except oss2.exceptions.NotFound:
            done = 0
        if done == size > 0:
            return
        try:
            with open(source, 'rb') as file:
                file.seek(done)
                bucket.append_object(key, done, oss2.SizedFileAdapter(file, size - done))
        except oss2.exceptions.PositionNotEqualToLength as error:      # an answer was lost, or another writes there
            raise Transient('the file there has grown meanwhile') from error

    def remove(self, path: str) -> None:
        self._refuse_writing(path)
        self._do(path, lambda bucket, key: bucket.delete_object(key))

    def _refuse_writing(self, path: str) -> None:
        if not self.WRITABLE:
            raise DataError(f'{path}: nothing is written there, since this client is not WRITABLE')

    # ---------------------------------------------------------------- asking
    def _do(self, path: str, work: Callable[[Any, str], T]) -> T:
        bucket, key = parse(path)
        oss2 = self._oss2()
        import urllib3
        try:
            return work(self._bucket(path, bucket), key)
        except oss2.exceptions.RequestError as error:
            raise self._unreached(path, error.exception) from error
        except oss2.exceptions.OssError as error:
            raise self._refused(path, error) from error
        except urllib3.exceptions.HTTPError as error:      # while a body was coming
            raise Transient('no answer in time' if isinstance(error, urllib3.exceptions.TimeoutError) else _short(error)) from error

    def _bucket(self, path: str, name: str) -> Any:
        place = os.getpid(), name      # a connection must not be shared with a forked process
        if place not in self._buckets:
            oss2, keys = self._oss2(), self.keys()
            if not keys.endpoint:
                raise DataError(f'{path}: which region is asked? Set OSS_ENDPOINT, or FILE_SYSTEM: {{NAME: AliyunOssFs, ENDPOINT: ...}}')
            session = oss2.Session()
            session.session.max_redirects = 0
            auth = oss2.ProviderAuth(_Provider(self)) if keys.id else oss2.AnonymousAuth()
            self._buckets[place] = oss2.Bucket(auth, keys.endpoint, name, session=session, connect_timeout=self.TIMEOUT, enable_crc=False)
        return self._buckets[place]

    def keys(self) -> Keys:
        """Who asks; looked for once, and again when the store says that the token has passed."""
        if self._keys is None:
            self._keys = found = find_keys(self.cfg)
            note_secrets({'OSS_AK': found.id, 'OSS_SK': found.secret, 'OSS_TOKEN': found.token})
        return self._keys

    def _oss2(self) -> Any:
        try:
            oss2 = need('oss2', 'oss')
        except ImportError as error:
            raise DataError(f'oss:// needs oss2: {error}') from error
        logging.getLogger('oss2').setLevel(logging.ERROR)       # below, it tells tokens and what it signs
        return oss2

    def _unreached(self, path: str, error: Exception) -> Exception:
        import requests.exceptions as of
        if isinstance(error, (of.TooManyRedirects, of.InvalidSchema, of.InvalidURL, of.MissingSchema)):
            return DataError(f'{path}: the store redirects, which is not followed')
        if isinstance(error, of.SSLError):
            return DataError(f'{path}: {_short(error)}')
        return Transient('no answer in time' if isinstance(error, of.Timeout) else _short(error))

    def _refused(self, path: str, error: Any) -> Exception:
        said, source = hide(f'{error.status} {error.code} {error.message}'.strip()), self.keys().source
        if error.status == 404:
            return DataError(f'{path}: there is no such bucket' if error.code == 'NoSuchBucket' else f'{path}: does not exist')
        if error.status >= 500 or error.status in TRANSIENT or error.code == 'RequestTimeout':
            wait = error.headers.get('Retry-After', '')
            return Transient(said, float(wait) if wait.isdigit() else None)
        if error.status == 412:
            return _StartOver('the file changed while it was read')
        if error.status == 416:
            return _StartOver('the store cannot go on where the transfer broke')
        if error.code == 'SecurityTokenExpired':
            before, self._keys = self._keys, None
            if self.keys() != before:
                return Transient(said)
            return DataError(f'{path}: the security token has passed: put a new one where it came from, {source}')
        if error.code == 'RequestTimeTooSkewed':
            return DataError(f'{path}: the clock of this machine is {_skew(error.headers)} than that of the store, which then takes no '
                             'signature: set it (NTP)')
        if error.code in OF_THE_KEYS:
            return DataError(f'{path}: the store does not take the keys from {source}: {error.code}')
        return DataError(f'{path}: {said}')


class _Provider:
    """What oss2 asks for keys, so that it is given new ones when they have changed."""

    def __init__(self, client: AliyunOssFs):
        self.client = client

    def get_credentials(self) -> Any:
        keys = self.client.keys()
        return self.client._oss2().credentials.Credentials(keys.id, keys.secret, keys.token or None)


def find_keys(cfg: dict) -> Keys:
    """The keys of a client's config, else of the environment, else of ossutil's own file; empty ones where there are none."""
    env = os.environ
    endpoint = cfg['ENDPOINT'] or env.get('OSS_ENDPOINT', '')
    if cfg['OSS_AK'] and cfg['OSS_SK']:
        return Keys(cfg['OSS_AK'], cfg['OSS_SK'], cfg['OSS_TOKEN'] or '', endpoint, 'FILE_SYSTEM')
    if env.get('OSS_ACCESS_KEY_ID') and env.get('OSS_ACCESS_KEY_SECRET'):
        id, secret, token = (env.get(f'OSS_{name}', '').strip() for name in ('ACCESS_KEY_ID', 'ACCESS_KEY_SECRET', 'SESSION_TOKEN'))
        return Keys(id, secret, token, endpoint, 'the environment')
    file = Path.home() / '.ossutilconfig'
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read(file, encoding='utf-8')
    except (configparser.Error, UnicodeDecodeError) as error:
        raise DataError(f'{file} cannot be read: {type(error).__name__}') from None     # its text holds keys
    found = parser['Credentials'] if parser.has_section('Credentials') else {}
    return Keys(found.get('accessKeyID', ''), found.get('accessKeySecret', ''), found.get('stsToken', ''),
                endpoint or found.get('endpoint', ''), str(file))


def parse(path: str) -> tuple[str, str]:
    """oss://bucket/key -> (bucket, key). Raises DataError where it is not of this form."""
    bucket, _, key = path.partition('://')[2].partition('/')
    if not bucket or any(part in ('.', '..') for part in key.split('/')) or '@' in bucket:
        raise DataError(f'{path.partition("?")[0]}: expected oss://bucket/key, without . and .. in the key')
    return bucket, key


def crc64(file: Path, size: int | None = None) -> int:
    """The CRC-64 (ECMA-182) of a file, or of its first bytes, as OSS keeps it."""
    import oss2.utils
    crc, left = oss2.utils.Crc64(), file.stat().st_size if size is None else size
    with open(file, 'rb', buffering=0) as opened:
        while data := opened.read(min(left, 1 << 22)):
            crc.update(data)
            left -= len(data)
    return crc.crc


def _skew(headers: Any) -> str:
    try:
        seconds = time.time() - parsedate_to_datetime(headers['Date']).timestamp()
    except (KeyError, TypeError, ValueError):
        return 'another'
    return f'{abs(seconds):,.0f} s {"later" if seconds > 0 else "earlier"}'


def _short(error: Exception) -> str:
    """The cause at the bottom, without the request that urllib3 and requests repeat around it."""
    deepest: Any = error
    while (below := next((e for e in (getattr(deepest, 'reason', None), *deepest.args) if isinstance(e, Exception)), None)) is not None:
        deepest = below
    if isinstance(partial := getattr(deepest, 'partial', None), int):
        return f'the connection broke off after {partial} bytes'
    return hide(reason(deepest).rpartition(': ')[2])
