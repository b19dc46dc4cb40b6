"""`app`: see in a browser what pruning does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dcp_prune.cli.common import Model, Whole, app, load_assistant, note, progress_bar
from dcp_prune.errors import DcpPruneError, InvalidInputError


@app.command(name="app")
def app_(
    *,
    model: Model = "testbed",
    host: Annotated[str, Parameter(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Whole, Parameter(help="The port to listen on.")] = 7860,
    results: Annotated[Path, Parameter(help="A folder with records of sweeps, for the leaderboard.")] = Path("results"),
) -> None:
    """See in a browser what pruning keeps, and what the model then answers. Stop it with Ctrl-C.

    Drop a picture or let the testbed draw one, ask, and move the slider. Nothing leaves this machine.
    """
    _check_port(host, port)
    try:
        from dcp_prune.app.page import App, launch
    except ModuleNotFoundError as missing:
        raise DcpPruneError(
            f"the app needs {missing.name}, which is not installed; run: pip install 'dcp-prune[app]'"
        ) from missing
    with progress_bar("Loading the model"):
        assistant = load_assistant(model)
    shown = f"[{host}]" if ":" in host else host
    note(f"{assistant.name} is at http://{shown}:{port}; Ctrl-C stops it")
    launch(App(assistant, results), host, port)


def _check_port(host: str, port: int) -> None:
    """Refuses a port that cannot be had, before anything that takes seconds, and names the next that can."""
    from dcp_prune.integrations.serving.sockets import listen

    if port < 1:
        raise InvalidInputError(f"--port must lie between 1 and 65535, got {port}")
    try:
        listen(host, port).close()
    except InvalidInputError as refused:
        for other in range(port + 1, min(port + 50, 65536)):
            try:
                listen(host, other).close()
            except InvalidInputError:
                continue
            raise InvalidInputError(f"port {port} on {host} is taken; use --port {other}, which is free") from None
        raise refused
