"""Which machines an address of a stranger may reach: those of the public network, and no others.

What is checked is the number that is connected to, so no spelling of it (0x7f000001), no name that leads inside, no redirect and no name
server that answers differently the second time goes around it.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import urllib.request
from typing import Any

from scepter.core.errors import DataError

NAT64 = ipaddress.IPv6Network('64:ff9b::/96')


def public_handlers() -> list[urllib.request.BaseHandler]:
    """What makes an opener of urllib connect to public machines alone. Proxies are left out: they would connect unseen."""
    return [urllib.request.ProxyHandler({}), _HTTP(), _HTTPS()]


def is_public(address: str) -> bool:
    """Whether a number of a machine, as the resolver gives it, is one of the public network."""
    ip = ipaddress.ip_address(address.partition('%')[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:       # the number of the old network that it stands for
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def connect(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
    """socket.create_connection to a public machine. Raises DataError where the name leads to any other."""
    host, port = address
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for number in map(str, found):
        if not is_public(number):
            raise DataError(f'{host} leads to {number}, which is not of the public network: an address that a stranger wrote may not '
                            'reach there. If it is yours, name it yourself')
    return socket.create_connection((str(found[0]), port), *args, **kwargs)


class _Plain(http.client.HTTPConnection):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._create_connection = connect


class _Secure(http.client.HTTPSConnection):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._create_connection = connect


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Plain, req)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Secure, req)
