"""The Hugging Face hub on loopback, as huggingface_hub speaks to it: commits, branches, small files by git's hash, large ones by sha256."""
from __future__ import annotations

import hashlib
import json
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers import faults

LARGE = 1000        # bytes from which on a file is kept as LFS keeps it


class Handler(faults.Handler):
    server: HubServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if self.server.token and self.headers['Authorization'] != f'Bearer {self.server.token}':
            self.answer(401)
        elif found := re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/tree/([^/]+).*)?', path):
            self._tell(found[1], found[2] or found[3] or 'main', is_tree=found[3] is not None)
        elif found := re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
            self._resolve(found[1], found[2], found[3])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def _commit(self, repo: str, revision: str) -> str | None:
        branches = self.server.repos.get(repo, {})
        commits = {commit(files): files for files in branches.values()}
        if revision in commits:
            return revision
        return commit(branches[revision]) if revision in branches else None

    def _files(self, repo: str, sha: str) -> dict[str, bytes]:
        return next(files for files in self.server.repos[repo].values() if commit(files) == sha)

    def _tell(self, repo: str, revision: str, is_tree: bool) -> None:
        sha = self._commit(repo, revision)
        if sha is None:
            self.answer(404, {'X-Error-Code': 'RevisionNotFound' if repo in self.server.repos else 'RepoNotFound'})
            return
        files = self._files(repo, sha)
        entries = [{'type': 'file', 'path': name, 'size': len(body), 'oid': git_hash(body)} for name, body in sorted(files.items())]
        for entry in entries:
            if entry['size'] >= LARGE:
                entry['lfs'] = {'oid': sha256(files[entry['path']]), 'size': entry['size'], 'pointerSize': 130}
        told: Any = entries if is_tree else {'id': repo, 'sha': sha, 'private': False, 'tags': [], 'downloads': 0, 'likes': 0,
                                             'siblings': [{'rfilename': name} for name in sorted(files)]}
        self.answer(200, {'Content-Type': 'application/json'}, json.dumps(told).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        sha = self._commit(repo, revision)
        if sha is None or name not in self._files(repo, sha):
            self.answer(404, {'X-Error-Code': 'EntryNotFound' if sha else 'RepoNotFound', **({'X-Repo-Commit': sha} if sha else {})})
            return
        body = self._files(repo, sha)[name]
        is_large = len(body) >= LARGE
        headers = {'X-Repo-Commit': sha, 'ETag': f'"{sha256(body) if is_large else git_hash(body)}"'}
        if is_large:
            headers |= {'X-Linked-Etag': headers['ETag'], 'X-Linked-Size': str(len(body))}
        if self.command == 'HEAD':
            self.answer(200, {**headers, 'Content-Length': str(len(body))})
        else:
            self.server.gets.append(name)
            self.give(self.server.fault, body, headers, self.server.gets.count(name))


class HubServer(faults.Server):
    """`repos`: repository -> branch -> name -> bytes."""

    handler = Handler

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.fault, self.token = 'fine', ''
        self.requests: list[tuple[str, str]] = []
        self.gets: list[str] = []
        super().__init__()


def commit(files: dict[str, bytes]) -> str:
    """A name for these files, of the form of a commit's."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def git_hash(body: bytes) -> str:
    return hashlib.sha1(f'blob {len(body)}\0'.encode() + body).hexdigest()
