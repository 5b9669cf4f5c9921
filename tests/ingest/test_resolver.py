"""Only public addresses are asked, however they are written, unless the configuration says otherwise."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import pytest
from aiohttp.resolver import AsyncResolver

from ingest.addresses import is_public, literal_address
from ingest.config import FetchConfig
from ingest.resolver import BlockedAddressError, Resolver, UnresolvedError


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
        ("fec0::1", False),
        ("64:ff9b:1::7f00:1", False),
        ("::7f00:1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("2130706433", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("example.com", None),
        ("1and1.example", None),
    ],
)
def test_addresses_in_disguise(host: str, address: str | None) -> None:
    assert literal_address(host) == address


def test_names_are_remembered_with_or_without_an_address() -> None:
    async def main() -> None:
        resolver = Resolver(FetchConfig(allow_private=True))
        try:
            found = await asyncio.gather(*(resolver.resolve("localhost", port) for port in (80, 81)))
            assert [hosts[0]["port"] for hosts in found] == [80, 81]
            assert found[0][0]["host"] == "127.0.0.1"
            for _ in range(2):
                with pytest.raises(UnresolvedError, match=r"nothing\.invalid"):
                    await resolver.resolve("nothing.invalid", 80)
            assert len(resolver._known) == 2
        finally:
            await resolver.close()

    asyncio.run(main())


def test_a_name_for_a_private_address_is_refused() -> None:
    async def main() -> None:
        resolver = Resolver(FetchConfig())
        try:
            with pytest.raises(BlockedAddressError, match=r"localhost is 127\.0\.0\.1"):
                await resolver.resolve("localhost", 80)
        finally:
            await resolver.close()

    asyncio.run(main())


class NameServer(asyncio.DatagramProtocol):
    """Answers every question for an IPv4 address with the same ones, by RFC 1035; any other with none."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        end = data.index(b"\0", 12) + 5
        question, kind = data[12:end], data[end - 4 : end - 2]
        addresses = self.addresses if kind == b"\0\1" else []
        answers = [b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton(one) for one in addresses]
        head = data[:2] + struct.pack(">HHHHH", 0x8180, 1, len(answers), 0, 0)
        self.transport.sendto(head + question + b"".join(answers), address)


@pytest.mark.parametrize("private", [True, False])
def test_of_a_name_with_several_addresses_only_the_public_ones_are_asked(private: bool) -> None:
    async def main() -> list[str]:
        made = asyncio.get_running_loop().create_datagram_endpoint(
            lambda: NameServer(["127.0.0.1", "93.184.216.34", "10.0.0.1"]), ("127.0.0.1", 0)
        )
        transport, _ = await made
        port = transport.get_extra_info("sockname")[1]
        resolver = Resolver(FetchConfig(allow_private=private))
        await resolver._inner.close()
        resolver._inner = AsyncResolver(nameservers=["127.0.0.1"], udp_port=port)
        try:
            return sorted(one["host"] for one in await resolver.resolve("mixed.example", 80))
        finally:
            await resolver.close()
            transport.close()

    everything = ["10.0.0.1", "127.0.0.1", "93.184.216.34"]
    assert asyncio.run(main()) == (everything if private else ["93.184.216.34"])


def test_networks_that_are_allowed_by_name() -> None:
    config = FetchConfig(allow_networks=("10.1.0.0/16", "::1/128"))
    assert [config.may_ask(one) for one in ("10.1.2.3", "10.2.2.3", "::1", "93.184.216.34")] == [
        True, False, True, True,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="10"):
        FetchConfig(allow_networks=("10.1.2",))
