"""The command `completion`: makes a shell complete commands and options."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from dcp_prune.cli.common import app


@app.command
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="Your shell.")],
) -> None:
    """Print the script that makes a shell complete commands and options.

    Load it in this shell: `source <(dcp-prune completion bash)`. To keep it, write it to the folder in which your shell
    looks for completions.
    """
    sys.stdout.write(app.generate_completion(prog_name="dcp-prune", shell=shell))
