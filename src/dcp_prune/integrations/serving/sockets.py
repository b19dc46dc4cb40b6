"""Where a server listens; nothing heavy is imported, so that a taken port is told at once."""

from __future__ import annotations

import socket

from dcp_prune.errors import InvalidInputError


def listen(host: str, port: int) -> socket.socket:
    """An open socket; port 0 takes any free port, and `url_of` says which.

    Raises:
        InvalidInputError: there is no such host, or the port is taken or not allowed.
    """
    try:
        if not 0 <= port <= 65535:
            raise OverflowError("ports go from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise InvalidInputError(
            f"cannot listen on {host}, port {port}: {cause}; name another --host or --port"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """What OpenAI clients take as `base_url`."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
