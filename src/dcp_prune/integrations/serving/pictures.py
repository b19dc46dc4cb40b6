"""Pictures of a request: bytes in it, or behind addresses that a stranger chose and this machine must beware of."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import httpx2
from PIL import Image

from dcp_prune.errors import InvalidInputError
from dcp_prune.images import decode_image
from dcp_prune.integrations.serving.limits import Limits

_REDIRECTS = 3
_TRANSLATED = tuple(ipaddress.ip_network(each) for each in ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"))
"""IPv6 addresses that stand for IPv4 ones, which may be private."""


async def fetch(urls: Sequence[str], limits: Limits, *, allow_private: bool = False) -> list[bytes]:
    """The bytes of every picture, in order; all that lie behind addresses within one deadline.

    Args:
        urls: `data:image/...;base64,...`, or http(s) addresses.
        limits: see there.
        allow_private: also fetch from loopback, private and other addresses that are not public.

    Raises:
        InvalidInputError: another kind of address, one that is too long, refused or does not answer; too many bytes, or
            too late.
    """
    for url in urls:
        # Anything else would be taken for a path of this machine, which is not the client's to read.
        if not url.startswith(("data:image/", "http://", "https://")):
            raise InvalidInputError("an image must be given as a data:image/...;base64,... or http(s) address")
        if url.startswith("http") and len(url) > limits.url:
            raise InvalidInputError(
                f"the address {url[:60]}... has {len(url):,} characters; {limits.url:,} are the most"
            )
    transport = httpx2.AsyncHTTPTransport() if allow_private else _PublicOnly()
    # Without the proxies of the environment: behind one, nobody could say which address is asked in the end.
    client = httpx2.AsyncClient(
        transport=transport, trust_env=False, follow_redirects=True, max_redirects=_REDIRECTS, timeout=limits.seconds
    )
    url = ""
    try:
        async with asyncio.timeout(limits.seconds), client:
            found = []
            for url in urls:
                found.append(b"" if url.startswith("data:") else await _download(client, url, limits.picture))
            return found
    except TimeoutError:
        raise InvalidInputError(
            f"the image at {url[:200]} cannot be read: it did not arrive within {limits.seconds:g} seconds"
        ) from None
    except InvalidInputError:
        raise
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise InvalidInputError(f"the image at {url[:200]} cannot be read ({type(error).__name__})") from None


def decode(urls: Sequence[str], fetched: Sequence[bytes], limits: Limits) -> tuple[list[Image.Image], tuple[str, ...]]:
    """The pictures as 8-bit RGB, upright, and what is to be said about them; as the command line reads files.

    Raises:
        InvalidInputError: one is no image, damaged, too small, or all of them have too many pixels together.
    """
    images, notes, left = [], [], limits.pixels
    for url, data in zip(urls, fetched, strict=True):
        called = f"the image at {url[: url.find(',')] if url.startswith('data:') else url[:200]}"
        if url.startswith("data:"):
            try:
                data = base64.b64decode(url.partition(",")[2], validate=True)
            except (binascii.Error, ValueError):
                raise InvalidInputError(f"{called[:200]} cannot be read: what follows is not base64") from None
        loaded = decode_image(io.BytesIO(data), called[:200], max_pixels=left)
        left -= loaded.image.width * loaded.image.height
        images.append(loaded.image)
        notes.extend(loaded.notes)
    return images, tuple(notes)


async def _download(client: httpx2.AsyncClient, url: str, most: int) -> bytes:
    async with client.stream("GET", url, headers={"accept": "image/*"}) as answer:
        if answer.status_code != 200:
            raise InvalidInputError(f"the image at {url[:200]} cannot be read: the answer was {answer.status_code}")
        data = bytearray()
        async for piece in answer.aiter_bytes(2**16):
            data += piece
            if len(data) > most:
                raise InvalidInputError(f"the image at {url[:200]} has more than {most:,} bytes; send a smaller one")
        return bytes(data)


class _PublicOnly(httpx2.AsyncHTTPTransport):
    """Connects to the very address that was looked at, at each redirect anew: a name may change its mind in between."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.url.host
        port = request.url.port or {"http": 80, "https": 443}[request.url.scheme]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        if not all(is_public(address) for address in addresses):
            raise InvalidInputError(
                f"the image at {str(request.url)[:200]} is not fetched: {host} is not a public address; send the "
                "picture itself, or start the server with --allow-private-addresses"
            )
        extensions: dict[str, Any] = {**request.extensions, "sni_hostname": host}
        return await super().handle_async_request(
            httpx2.Request(
                request.method,
                request.url.copy_with(host=addresses[0]),
                headers=request.headers,
                extensions=extensions,
            )
        )


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and to nothing nearer."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast
