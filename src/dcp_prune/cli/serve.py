"""`serve`: a model with its pruner, for clients that speak the OpenAI API."""

from __future__ import annotations

import logging
from typing import Annotated

from cyclopts import Parameter

from dcp_prune.cli.common import (
    KeepRatio,
    Model,
    NumTokens,
    PrunerName,
    Whole,
    app,
    build_pruner,
    load_assistant,
    note,
    progress_bar,
)


@app.command
def serve(
    model: Model = "testbed",
    *,
    pruner: PrunerName = "dcp",
    num_tokens: NumTokens = None,
    keep_ratio: KeepRatio = None,
    host: Annotated[str, Parameter(help="Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Whole, Parameter(help="Where to listen; 0 takes any free port.")] = 8000,
    api_key: Annotated[
        str | None,
        Parameter(env_var="DCP_PRUNE_API_KEY", help="Answer only clients that send this key; if not said: everybody."),
    ] = None,
    allow_private_addresses: Annotated[
        bool,
        Parameter(
            negative="",
            help="Fetch pictures from this machine and its network as well, not only from public addresses.",
        ),
    ] = False,
) -> None:
    """Serve a model with pruned images behind the OpenAI API.

    Streaming or not, as `transformers serve` does it. The pruner `none` reads all visual tokens. What was pruned is
    said on stderr, one line per request with images, and counted at /metrics. Stop it with Ctrl-C.
    """
    from dcp_prune.integrations.serving import listen, url_of

    with listen(host, port) as listener:  # first, since what comes now takes a while
        chosen = None if pruner == "none" else build_pruner(pruner, num_tokens, keep_ratio)

        from transformers.utils.logging import set_verbosity_error

        from dcp_prune.integrations.serving import LOGGER, Server

        set_verbosity_error()  # importing transformers has undone what `quiet_libraries` did
        with progress_bar("Loading the model"):
            assistant = load_assistant(model)
        server = Server(
            assistant.model,
            assistant.processor,
            chosen,
            name=assistant.name,
            api_key=api_key,
            allow_private_addresses=allow_private_addresses,
        )
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
        if assistant.knows is not None:
            note(f"{assistant.name} is a small model that knows {assistant.knows}; its other answers mean nothing")
        note(f"{assistant.name} with the pruner {pruner} answers at {url_of(listener)}; Ctrl-C stops it")
        try:
            server.run(listener)
        except KeyboardInterrupt:  # raised again by uvicorn once all calls are answered
            note("stopped")
