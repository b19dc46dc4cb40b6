"""The command line, `dcp-prune`: reads what was typed, calls the library, shows what came out.

One module per group of commands; importing it registers them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import cyclopts

from dcp_prune.cli import (  # noqa: F401
    app_page,
    ask,
    catalogue,
    compare,
    completion,
    evaluate,
    profile,
    report,
    serve,
    sweep,
    validate,
    vllm_args,
)
from dcp_prune.cli.common import app, fail, quiet_libraries
from dcp_prune.errors import DcpPruneError

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `dcp-prune`; leaves with exit code 2 and one sentence if what was typed cannot be done."""
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files, and terminals, are not always UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        app(_with_bare_json(sys.argv[1:] if arguments is None else arguments))
    except (DcpPruneError, cyclopts.CycloptsError) as error:
        fail(" ".join(str(error).split()))
    except BrokenPipeError:  # whoever read the output has seen enough, as in `dcp-prune list | head -1`
        sys.stdout = None
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", code=130)
    except MemoryError:
        fail("the memory is full; ask for less at once")
    except OSError as error:
        fail(f"the system refused: {error}")


def _with_bare_json(arguments: Sequence[str]) -> list[str]:
    """`--json` without a file, and `--json -`, mean the screen; the parser takes a lone `-` only behind `=`."""
    given = list(arguments)
    spelled: list[str] = []
    while given:
        word = given.pop(0)
        if word == "--json" and (not given or given[0] == "-" or given[0].startswith("--")):
            word = "--json=-"
            if given and given[0] == "-":
                given.pop(0)
        spelled.append(word)
    return spelled
