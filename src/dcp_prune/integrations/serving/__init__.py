"""A model with its pruner behind the OpenAI API: `Server(model, processor, pruner, name=...).run(listen(host, port))`.

    asked.py       what a client may send, and what is refused by name
    pictures.py    pictures of data and http(s) addresses, within limits of time, bytes and pixels
    answers.py     generation and the forms of answers, on private parts of `transformers serve`, used here only
    server.py      the routes
    limits.py meter.py sockets.py    how much one request may ask for; what pruning did so far; where to listen

Names are resolved when first used: the port is tried before transformers is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcp_prune.errors import DcpPruneError

if TYPE_CHECKING:
    from dcp_prune.integrations.serving.limits import Limits
    from dcp_prune.integrations.serving.meter import LOGGER, Meter
    from dcp_prune.integrations.serving.server import Server
    from dcp_prune.integrations.serving.sockets import listen, url_of

_HOME_OF = {
    "LOGGER": "meter",
    "Limits": "limits",
    "Meter": "meter",
    "Server": "server",
    "listen": "sockets",
    "url_of": "sockets",
}
__all__ = ["LOGGER", "Limits", "Meter", "Server", "listen", "url_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    except ModuleNotFoundError as missing:
        raise DcpPruneError(
            f"serving needs {missing.name}, which is not installed; run: pip install 'dcp-prune[serve]'"
        ) from missing
