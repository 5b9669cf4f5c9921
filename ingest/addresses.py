"""Which IP addresses are public hosts, in all the forms in which an address can be written."""

from __future__ import annotations

import ipaddress
import socket

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All of version 6 that IANA hands out; site-local addresses and NAT64 for local use (RFC 8215) lie outside."""


def is_public(address: str) -> bool:
    """Tell whether an IP address, version 4 or 6 (mapped, 6to4 and NAT64 forms looked through), is a public host's."""
    parsed = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if parsed not in _GLOBAL_UNICAST:
            return False
    return parsed.is_global and not parsed.is_multicast


def literal_address(host: str) -> str | None:
    """Return the address when a URL's host is written as one (also `2130706433`, `127.1`, `0x7f.1`), else None."""
    try:
        return str(ipaddress.ip_address(host.strip("[]").split("%", 1)[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host)) if host[:1].isdigit() else None
    except OSError:
        return None
