"""What all commands share: parameter types, progress, errors, and the way results come out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import App, Parameter
from rich.console import Console

from dcp_prune import __version__, files
from dcp_prune.budget import DEFAULT_NUM_TOKENS
from dcp_prune.errors import InvalidInputError
from dcp_prune.files import to_json, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_prune.assistant import Assistant
    from dcp_prune.pruners.base import Pruner

# transformers takes seconds to import, so everything that needs it is imported where it is used: --help, `list` and
# complaints about bad input answer at once.


def versions() -> str:
    """This program's version and those of what decides its answers. Nothing is imported for it."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"dcp-prune {__version__} ({packages}, Python {sys.version.split()[0]})"


app = App(
    name="dcp-prune",
    version=versions,
    help_format="markdown",
    help="""Ask a vision-language model about images with 16 instead of 576 visual tokens.

    A vision-language model cuts an image into patches and reads one visual token per patch. Most of them say little.
    A pruner keeps the few that matter for the image and the question. The model then answers faster and needs less
    memory. This program shows how well that works, on a small trained model that comes with it or on your own.

    Start with: dcp-prune demo
    """,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,  # or Ctrl-C would leave without a word
)


def whole_number(type_: Any, tokens: Sequence[Any]) -> int:
    # The parser's own conversion would quietly round 1.5.
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError("give a whole number") from None


def whole_numbers(given: list[str]) -> list[int]:
    """The numbers of an option that takes them with commas between them, several times, or both; each once.

    Raises:
        InvalidInputError: something in between is no whole number.
    """
    budgets: dict[int, None] = {}
    for text in ",".join(given).split(","):
        try:
            budgets[int(text)] = None
        except ValueError:
            raise InvalidInputError(
                f"--num-tokens takes whole numbers separated by commas, such as 16,32,64; got {text!r}"
            ) from None
    return list(budgets)


def seed_range_of(text: str) -> range:
    """Reads A:B.

    Raises:
        InvalidInputError: anything else.
    """
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last))
    except ValueError:
        seeds = range(0)
    if not colon or not seeds:
        raise InvalidInputError(f"--seed-range must be A:B with whole numbers A below B, got {text!r}")
    return seeds


Whole = Parameter(converter=whole_number, allow_leading_hyphen=True, n_tokens=1)
Text = Parameter(allow_leading_hyphen=True)
Budgets = Parameter(negative="", allow_leading_hyphen=True)

Json = Annotated[
    Path | None, Parameter(help="Write the result as JSON to this file, or to the screen if you name no file.")
]
Model = Annotated[
    str,
    Parameter(
        help="testbed (the same as testbed-natural), testbed-weak, or a LLaVA-1.5 model by its folder or hub name."
    ),
]
Tiles = Annotated[
    bool,
    Parameter(
        negative="",
        help="Ask about images of twice the width and height. The model sees them as LLaVA-NeXT does: an overview and "
        "2 x 2 tiles, 2880 visual tokens.",
    ),
]
PrunerName = Annotated[str, Parameter(help="The pruner that selects the tokens; `dcp-prune list` shows all.")]
NumTokens = Annotated[
    int | None,
    Whole,
    Parameter(help=f"Visual tokens to keep per image. Default: {DEFAULT_NUM_TOKENS}.", show_default=False),
]
KeepRatio = Annotated[float | None, Parameter(help="The share of visual tokens to keep, up to 1, instead of a number.")]
ImageFile = Annotated[Path, Parameter(help="An image file of any size and format.")]


def fail(sentence: str, code: int = 2) -> NoReturn:
    sys.stderr.write(f"error: {sentence}\n")
    raise SystemExit(code)


def quiet_libraries() -> None:
    """What libraries have to say about themselves would drown the answer; warnings become notes."""
    warnings.showwarning = lambda message, *_, **__: note(str(message))
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)


def note(sentence: str) -> None:
    sys.stderr.write(f"note: {sentence}\n")


def build_pruner(name: str, num_tokens: int | None, keep_ratio: float | None) -> Pruner:
    from dcp_prune.registry import make_pruner

    if num_tokens is None and keep_ratio is None:
        num_tokens = DEFAULT_NUM_TOKENS
    return make_pruner(name, num_tokens=num_tokens, keep_ratio=keep_ratio)


def load_assistant(model: str) -> Assistant:
    from transformers.utils import logging

    logging.disable_progress_bar()
    from dcp_prune.assistant import Assistant

    return Assistant.load(model)


def check_outputs(*paths: Path | None, inputs: Iterable[Path | str | None] = ()) -> None:
    """Refuses outputs that cannot be written or would destroy an input (a model's folder is one), and says what is
    replaced."""
    outputs = [path for path in paths if path is not None and str(path) != "-"]
    for path in files.check_outputs(outputs, [Path(path) for path in inputs if path is not None]):
        note(f"{path} is there already and is replaced")


def environment_now() -> dict[str, Any]:
    from dcp_prune.environment import environment

    return dict(environment())


def report_result(result: dict[str, Any], json: Path | None, show: Callable[[Console], None]) -> None:
    """Writes the JSON where it was asked for; people read the other form, unless the screen is given to the JSON."""
    if json is not None and str(json) == "-":
        sys.stdout.write(to_json(result))
        return
    if json is not None:
        write_atomically(json, to_json(result).encode())
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    show(console)
    if json is not None:
        console.print(f"The numbers: {json}", highlight=False, markup=False)


@contextmanager
def progress_bar(first: str, then: str = "Answering questions") -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, on stderr; it is gone when the work is done. `first` is said until work is counted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(first, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, description=then, completed=done, total=total)

        yield advance


def png_bytes(image: Any) -> bytes:
    from io import BytesIO

    stream = BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
