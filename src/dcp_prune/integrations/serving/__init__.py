"""A model with its pruner behind the OpenAI API: `Server(model, processor, pruner, name=...).run(listen(host, port))`.

asked.py       what a client may send, and what is refused by name
pictures.py    pictures of data and http(s) addresses, within limits of time, bytes and pixels
answers.py     generation and the forms of answers, on private parts of `transformers serve`, used here only
server.py      the routes
limits.py meter.py    how much one request may ask for; what pruning did so far
"""

from dcp_prune.errors import DcpPruneError

try:
    import fastapi  # noqa: F401
    import httpx2  # noqa: F401
    import openai  # noqa: F401  # the types of requests and answers
    import uvicorn  # noqa: F401
except ModuleNotFoundError as missing:
    raise DcpPruneError(
        f"serving needs {missing.name}, which is not installed; run: pip install 'dcp-prune[serve]'"
    ) from missing

from dcp_prune.integrations.serving.limits import Limits
from dcp_prune.integrations.serving.meter import LOGGER, Meter
from dcp_prune.integrations.serving.server import Server, listen, url_of

__all__ = ["LOGGER", "Limits", "Meter", "Server", "listen", "url_of"]
