"""How much one request may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one request may take. Ours: room for a phone's largest photograph, or many small ones.

    Attributes:
        body: bytes of the request; pictures in it are a third larger than their files.
        pictures: how many.
        picture: bytes of one that is fetched.
        pixels: of all pictures together, once decoded.
        text: characters of everything else.
        items: objects and lists, brackets in texts included.
        url: characters of an address.
        seconds: until all pictures behind addresses have arrived.
    """

    body: int = 32 * MIB
    pictures: int = 32
    picture: int = 20 * MIB
    pixels: int = 64_000_000
    text: int = 1_000_000
    items: int = 100_000
    url: int = 2_048
    seconds: float = 10.0
