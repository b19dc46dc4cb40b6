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
    host: Annotated[str, Parameter(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Whole, Parameter(help="The port to listen on; 0 takes any free port.")] = 8000,
    api_key: Annotated[
        str | None,
        Parameter(
            env_var="DCP_PRUNE_API_KEY", help="Answer only clients that send this key. Default: answer everybody."
        ),
    ] = None,
    allow_private_addresses: Annotated[
        bool,
        Parameter(
            negative="",
            help="Also fetch images from this machine and its network, not only from public addresses.",
        ),
    ] = False,
) -> None:
    """Serve a model with pruned images behind the OpenAI API.

    It streams or not, as `transformers serve` does. With the pruner `none`, the model reads all visual tokens. Each
    request with images writes one line to stderr that says what was pruned; /metrics counts it. Stop the server with
    Ctrl-C.
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
