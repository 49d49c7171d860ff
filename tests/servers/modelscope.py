"""ModelScope's hub on loopback: lists of files with their sha256, and the files, through a fault."""
from __future__ import annotations

import hashlib
import json
from urllib.parse import parse_qsl, urlsplit

from tests.servers import faults


class Handler(faults.Handler):
    server: ModelscopeServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked, query = url.path.split('/'), dict(parse_qsl(url.query))      # /api/v1/models/org/model/repo[/files]
        self.server.authorizations.append(self.headers['Authorization'])
        files = self.server.repos.get(('/'.join(asked[4:6]), query.get('Revision', 'master')))
        if self.server.token and self.headers['Authorization'] != f'Bearer {self.server.token}':
            self.answer(403)
        elif files is None or asked[6] != 'repo':
            self.answer(404)
        elif asked[7:] == ['files']:
            entries = [{'Path': name, 'Name': name, 'Type': 'blob', 'Size': len(body), 'Sha256': hashlib.sha256(body).hexdigest()}
                       for name, body in files.items()]
            folders = [{'Path': name.partition('/')[0], 'Type': 'tree', 'Size': 0} for name in files if '/' in name]
            self.answer(200, {}, json.dumps({'Code': 200, 'Success': True, 'Data': {'Files': entries + folders}}).encode())
        else:
            name = query['FilePath']
            self.server.gets.append((name, self.headers['Range']))
            self.give(self.server.fault, files[name], {'ETag': f'"{name}"'}, sum(asked == name for asked, _ in self.server.gets))


class ModelscopeServer(faults.Server):
    """`repos` holds the files of each repository and revision."""

    handler = Handler

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.fault, self.token = 'fine', ''
        self.gets: list[tuple[str, str | None]] = []
        self.authorizations: list[str | None] = []
        super().__init__()
