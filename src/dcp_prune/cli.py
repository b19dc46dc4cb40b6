"""The command line, `dcp-prune`: reads what was typed, calls the library, shows what came out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from dcp_prune import __version__
from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.files import check_writable, to_json, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_prune.assistant import Assistant, Reply, View
    from dcp_prune.images import LoadedImage
    from dcp_prune.pruners.base import Pruner

# transformers takes seconds to import, so everything that needs it is imported where it is used: --help, `list` and
# complaints about bad input answer at once.

DEFAULT_NUM_TOKENS = 16
DEMO_PICTURE = Path("demo/kept.png")
"""The one output whose folder is made if need be."""

app = App(
    name="dcp-prune",
    version=__version__,
    help_format="markdown",
    help="""Ask a vision-language model about images with 16 instead of 576 visual tokens.

    A vision-language model cuts an image into patches and reads one visual token per patch. Most of them say little.
    A pruner keeps the few that matter for the image and the question, which makes the model faster and its memory
    smaller. This program shows how well that works, on a small trained model that comes with it or on your own.

    Start with: dcp-prune demo
    """,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
)
testbed = App(name="testbed", help="Measure pruners on the small model that comes with this program.")
app.command(testbed)


def _whole(type_: Any, tokens: Sequence[Any]) -> int:
    # The parser's own conversion would quietly round 1.5.
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError("give a whole number") from None


Whole = Parameter(converter=_whole, allow_leading_hyphen=True, n_tokens=1)
Text = Parameter(allow_leading_hyphen=True)

Json = Annotated[
    Path | None, Parameter(help="Write the result as JSON: to this file, or to the screen if no file is named.")
]
Model = Annotated[
    str, Parameter(help="testbed-weak, testbed-aligned, the folder of a LLaVA-1.5 model, or its hub name.")
]
PrunerName = Annotated[str, Parameter(help="Which pruner selects the tokens; `dcp-prune list` shows them.")]
NumTokens = Annotated[
    int | None,
    Whole,
    Parameter(help=f"Visual tokens to keep; {DEFAULT_NUM_TOKENS} if nothing is said.", show_default=False),
]
KeepRatio = Annotated[float | None, Parameter(help="Instead of a number: the share of visual tokens to keep, up to 1.")]
ImageFile = Annotated[Path, Parameter(help="An image file, of any size and kind.")]


@app.command
def demo(
    *,
    output: Annotated[Path, Parameter(help="Where to put the picture of kept tokens (PNG).")] = DEMO_PICTURE,
    num_tokens: Annotated[int, Whole, Parameter(help="Visual tokens to keep.")] = DEFAULT_NUM_TOKENS,
    images: Annotated[int, Whole, Parameter(help="How many images; two questions are asked about each.")] = 6,
    crowded: Annotated[
        bool, Parameter(negative="", show_default=False, help="Show 9 to 13 objects in an image instead of 4 to 7.")
    ] = False,
    model: Model = "testbed",
    json: Json = None,
) -> None:
    """See it work: a trained model answers questions with all visual tokens and with a few.

    The images are drawn on the spot and the model has never seen them; they are the first ones of the held-out seeds,
    not chosen for their results.
    """
    from dcp_prune.registry import make_pruner

    if images < 1:
        raise InvalidInputError(f"--images must be at least 1, got {images}")
    pruners = {name: make_pruner(name, num_tokens=num_tokens) for name in ("dcp", "random")}
    new_folder = output == DEMO_PICTURE and not output.parent.exists()
    _check_outputs(output.parent if new_folder else output, json)

    from dcp_prune.eval.demo import draw_demo, run_demo, summarise_demo

    with _progress("Loading the model") as advance:
        assistant = _load(model)
        shown = run_demo(assistant, pruners, images, "crowded" if crowded else "standard", progress=advance)
    summary = summarise_demo(shown)
    output.parent.mkdir(exist_ok=True)
    write_atomically(output, _png(draw_demo(shown, assistant.name)))
    result = {"model": assistant.name, "picture": str(output), **summary, "environment": _environment()}

    def show(console: Console) -> None:
        table = Table("question", "tokens", "answer", "", "kappa", "prefill", "ms", box=None, pad_edge=False)
        for column in table.columns[4:]:
            column.justify = "right"
        for number, question in enumerate(summary["questions"]):
            for line, answer in enumerate(question["answers"]):
                table.add_row(
                    (question["text"], f"  the truth: {question['truth']}", "")[min(line, 2)],
                    f"{answer['visual_tokens']} {answer['method']}",
                    answer["answer"],
                    "right" if answer["correct"] else "wrong",
                    f"{answer['kappa']:.2f}",
                    str(answer["prefill_tokens"]),
                    f"{answer['milliseconds']:.0f}",
                )
            if number + 1 < len(summary["questions"]):
                table.add_row()
        console.print(table)
        console.print()
        for method in summary["methods"]:
            console.print(
                f"{method['method']:>7}  {method['correct']} of {method['questions']} right, "
                f"{method['visual_tokens']} visual tokens, {method['prefill_tokens']:.0f} tokens to prefill, "
                f"{method['milliseconds']:.0f} ms to the first word"
            )
        console.print(
            f"\nkappa: how far the kept tokens' distribution is from that of all tokens (0: not at all).\n"
            f"The kept tokens over the images: {output}"
        )

    _report(result, json, show)


@app.command
def run(
    *,
    image: ImageFile,
    question: Annotated[str | None, Text, Parameter(help="What you want to know about the image.")] = None,
    prompt: Annotated[
        str | None, Text, Parameter(help="Instead of a question: the whole prompt, with `<image>` in its place.")
    ] = None,
    model: Model = "testbed",
    pruner: PrunerName = "dcp",
    num_tokens: NumTokens = None,
    keep_ratio: KeepRatio = None,
    max_new_tokens: Annotated[int, Whole, Parameter(help="Where the answer is cut off at the latest.")] = 32,
    json: Json = None,
) -> None:
    """Ask one question about one image. The pruner `none` reads all visual tokens."""
    chosen = None if pruner == "none" else _pruner(pruner, num_tokens, keep_ratio)
    loaded, assistant, text = _prepare(image, question, prompt, model, json)
    view = assistant.look(loaded.image)
    reply = assistant.ask(loaded.image, view, text, chosen, max_new_tokens=max_new_tokens)

    def show(console: Console) -> None:
        console.print(reply.text, highlight=False, markup=False)
        console.print(
            f"[{reply.visual_tokens} of {len(view.features[0])} visual tokens, "
            f"{reply.prefill_tokens} tokens to prefill, kappa {reply.kappa:.2f}, "
            f"{reply.milliseconds:.0f} ms to the first word]",
            style="dim",
            markup=False,
            highlight=False,
        )

    _report(_as_json(assistant, pruner, loaded, question or text, view, reply), json, show)


@app.command
def inspect(
    *,
    image: ImageFile,
    question: Annotated[str | None, Text, Parameter(help="What you want to know about the image.")] = None,
    prompt: Annotated[
        str | None, Text, Parameter(help="Instead of a question: the whole prompt, with `<image>` in its place.")
    ] = None,
    output: Annotated[Path, Parameter(help="Where to put the picture (PNG).")] = Path("kept.png"),
    model: Model = "testbed",
    pruner: PrunerName = "dcp",
    num_tokens: NumTokens = None,
    keep_ratio: KeepRatio = None,
    max_new_tokens: Annotated[int, Whole, Parameter(help="Where the answer is cut off at the latest.")] = 32,
    json: Json = None,
) -> None:
    """Draw what a pruner kept: the image, its saliency, the kept tokens, and which of them stands for which patch."""
    chosen = _pruner(pruner, num_tokens, keep_ratio)
    loaded, assistant, text = _prepare(image, question, prompt, model, json, output)
    view = assistant.look(loaded.image)
    full = assistant.ask(loaded.image, view, text, max_new_tokens=max_new_tokens)
    reply = assistant.ask(loaded.image, view, text, chosen, max_new_tokens=max_new_tokens)

    import numpy as np

    from dcp_prune.viz.overlay import inspection

    result = _as_json(assistant, pruner, loaded, question or text, view, reply)
    total = len(view.features[0])
    picture = inspection(
        view.image,
        kept=result["indices"],
        assignment=np.array(result["assignment"]),
        saliency=view.saliency,
        shape=view.shape,
        title=question or text,
        subtitle=f"with {reply.visual_tokens} of {total} visual tokens: {reply.text}\nwith all {total}: {full.text}",
        footer=f"{assistant.name}, {pruner}, {reply.visual_tokens} visual tokens, kappa {reply.kappa:.2f}"
        + {None: "", True: ", chosen anew by cluster", False: ", first choice kept"}[result["reselected"]],
    )
    write_atomically(output, _png(picture))

    def show(console: Console) -> None:
        console.print(reply.text, highlight=False, markup=False)
        console.print(
            f"[{reply.visual_tokens} of {total} visual tokens, kappa {reply.kappa:.2f}; with all: {full.text}]",
            style="dim",
            markup=False,
            highlight=False,
        )
        console.print(f"The picture: {output}", highlight=False, markup=False)

    _report({**result, "answer_all_tokens": full.text, "picture": str(output)}, json, show)


@app.command(name="list")
def list_(*, json: Json = None) -> None:
    """Show the pruners and the models that there are."""
    from dcp_prune.registry import get_pruner, list_pruners
    from dcp_prune.tokens import Signal

    _check_outputs(json)
    pruners = []
    for name in list_pruners():
        cls = get_pruner(name)
        signals = cls.requires | cls.optional
        pruners.append(
            {
                "name": name,
                "summary": (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "),
                "reads": [signal.value for signal in Signal if signal in signals],
            }
        )
    from dcp_prune.models import supported_architectures

    models = [
        {
            "name": "testbed-weak",
            "summary": "comes with this program; words and patches hardly look alike, as in real models",
        },
        {"name": "testbed-aligned", "summary": "comes with this program; the words were built into the patches"},
        *(
            {"name": name, "summary": "any model of this class, by folder or hub name"}
            for name in supported_architectures()
        ),
    ]

    def show(console: Console) -> None:
        for title, rows in (("Pruners", pruners), ("Models", models)):
            table = Table(title, "", box=None, pad_edge=False)
            for row in rows:
                reads = f" [reads {', '.join(row['reads'])}]" if row.get("reads") else ""
                table.add_row(f"  {row['name']}", " ".join(f"{row['summary']}".split()) + reads.replace("[", "\\["))
            console.print(table)
            console.print()

    _report({"pruners": pruners, "models": models}, json, show)


@testbed.command(name="eval")
def eval_(
    *,
    pruner: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="A pruner, or none for all tokens; say it several times to compare; if not at all: none, dcp, random.",
        ),
    ] = None,
    num_tokens: Annotated[
        list[int] | None,
        Parameter(
            converter=lambda type_, tokens: [_whole(type_, [token]) for token in tokens],
            allow_leading_hyphen=True,
            negative="",
            help="Visual tokens to keep; several times for several budgets; 0 is no image; if not said: 16.",
        ),
    ] = None,
    seed_range: Annotated[
        str | None, Parameter(help="Scenes from seed A up to B, B excluded, as A:B; if not said: all held-out seeds.")
    ] = None,
    limit: Annotated[int, Whole, Parameter(help="How many questions; each image has 14.")] = 1000,
    difficulty: Annotated[
        Literal["standard", "crowded"], Parameter(help="4 to 7 objects in an image, or 9 to 13.")
    ] = "standard",
    checkpoint: Annotated[
        str, Parameter(help="weak, aligned, or the folder of a model trained on the testbed.")
    ] = "weak",
    json: Json = None,
) -> None:
    """Measure accuracy on questions that the model has never seen, for any pruners at any budgets.

    Every pruner answers the very same questions. Accuracies come with 95 % intervals that know that questions about one
    image belong together; differences to the first pruner are paired. Training uses seeds below 900000000, tuning
    those up to 999999999, and held-out seeds begin at 1000000000.
    """
    from dcp_prune.testbed.seeds import HELD_OUT

    names = pruner or ["none", "dcp", "random"]
    budgets = num_tokens or [DEFAULT_NUM_TOKENS]
    seeds = HELD_OUT if seed_range is None else _seed_range(seed_range)
    if limit < 1:
        raise InvalidInputError(f"--limit must be at least 1 question, got {limit}")
    _check_outputs(json)

    from dcp_prune.eval.testbed import evaluate, plan, split_name, summarise

    methods = plan(names, budgets)
    split_name(seeds)
    with _progress("Loading the model") as advance:
        assistant = _load(f"testbed-{checkpoint}" if checkpoint in ("weak", "aligned") else checkpoint)
        evaluation = evaluate(
            assistant.model, assistant.processor, methods, seeds, limit, difficulty=difficulty, progress=advance
        )
    result = {**summarise(evaluation), "checkpoint": checkpoint, "environment": _environment()}

    def show(console: Console) -> None:
        asked = result["questions"]
        console.print(
            f"{asked['questions']} questions about {asked['images']} {asked['difficulty']} images, "
            f"{asked['split']} seeds {asked['first_seed']} to {asked['last_seed']}, checkpoint {checkpoint}\n",
            highlight=False,
        )
        tasks = list(dict.fromkeys(row["task"] for row in result["results"]))
        table = Table("pruner", "tokens", *tasks, "kappa", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for answers in evaluation.answers:
            rows = {
                row["task"]: row
                for row in result["results"]
                if (row["pruner"], row["num_tokens"]) == (answers.method.name, answers.num_tokens)
            }
            low, high = rows["all"]["ci95"]
            table.add_row(
                answers.method.name,
                str(answers.num_tokens),
                f"{100 * rows['all']['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})",
                *(f"{100 * rows[task]['accuracy']:.0f}" for task in tasks[1:]),
                "-" if rows["all"]["kappa"] is None else f"{rows['all']['kappa']:.2f}",
            )
        console.print(table)
        for pair in result["paired"]:
            if pair["task"] == "all":
                low, high = (100 * bound for bound in pair["ci95"])
                console.print(
                    f"\n{pair['pruner']} - {pair['against']} at {pair['num_tokens']} tokens: "
                    f"{100 * pair['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}",
                    highlight=False,
                    end="",
                )
        console.print("\n\nAccuracy in per cent; in brackets the 95 % interval.", style="dim", highlight=False)

    _report(result, json, show)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `dcp-prune`; leaves with exit code 2 and one sentence if what was typed cannot be done."""
    _quiet_libraries()
    try:
        app(_with_bare_json(sys.argv[1:] if arguments is None else arguments))
    except (DcpPruneError, cyclopts.CycloptsError) as error:
        _fail(" ".join(str(error).split()))
    except BrokenPipeError:  # whoever read the output has seen enough, as in `dcp-prune list | head -1`
        sys.stdout = None
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", code=130)
    except OSError as error:
        _fail(f"the system refused: {error}")


def _fail(sentence: str, code: int = 2) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    raise SystemExit(code)


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


def _quiet_libraries() -> None:
    """What libraries have to say about themselves would drown the answer; warnings become notes."""
    warnings.showwarning = lambda message, *_, **__: _note(str(message))
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)


def _note(sentence: str) -> None:
    sys.stderr.write(f"note: {sentence}\n")


def _pruner(name: str, num_tokens: int | None, keep_ratio: float | None) -> Pruner:
    from dcp_prune.registry import make_pruner

    if num_tokens is None and keep_ratio is None:
        num_tokens = DEFAULT_NUM_TOKENS
    return make_pruner(name, num_tokens=num_tokens, keep_ratio=keep_ratio)


def _prepare(
    image: Path, question: str | None, prompt: str | None, model: str, *outputs: Path | None
) -> tuple[LoadedImage, Assistant, str]:
    """Image, model and prompt; whatever can be refused without the model is refused before it is loaded."""
    from dcp_prune.images import load_image

    if (question is None) == (prompt is None):
        raise InvalidInputError("give either --question or --prompt")
    if question is not None and not question.strip():
        raise InvalidInputError(
            'the question is empty; ask something, for example --question "what color is the cat ?"'
        )
    _check_outputs(*outputs)
    loaded = load_image(image)
    for note in loaded.notes:
        _note(note)
    if prompt is not None:
        from dcp_prune.assistant import check_placeholders

        check_placeholders(prompt)
    with _progress("Loading the model"):
        assistant = _load(model)
    text = prompt if prompt is not None else assistant.prompt(question or "")
    unknown = assistant.unknown_words(question or "")
    if unknown:
        _note(f"{assistant.name} does not know {', '.join(unknown)}; it was trained on few words")
    return loaded, assistant, text


def _load(model: str) -> Assistant:
    from transformers.utils import logging

    logging.disable_progress_bar()
    from dcp_prune.assistant import Assistant

    return Assistant.load(model)


def _seed_range(text: str) -> range:
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last))
    except ValueError:
        seeds = range(0)
    if not colon or not seeds:
        raise InvalidInputError(f"--seed-range must be A:B with whole numbers A below B, got {text!r}")
    return seeds


def _check_outputs(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and str(path) != "-":
            check_writable(path)


def _as_json(
    assistant: Assistant, pruner: str, loaded: LoadedImage, question: str, view: View, reply: Reply
) -> dict[str, Any]:
    record = reply.record
    total = view.shape[0] * view.shape[1]
    everything = list(range(total))
    chosen_anew = None if record is None or record.reselected is None else bool(record.reselected[0])
    return {
        "model": assistant.name,
        "pruner": pruner,
        "question": question,
        "answer": reply.text,
        "num_tokens": reply.visual_tokens,
        "num_original": total,
        "prefill_tokens": reply.prefill_tokens,
        "kappa": reply.kappa,
        "reselected": chosen_anew,
        "milliseconds": {"first_token": reply.milliseconds, **({} if record is None else record.milliseconds)},
        "grid": list(view.shape),
        "indices": everything if record is None else record.indices[0].tolist(),
        "assignment": everything if record is None else record.assignment[0].tolist(),
        "notes": list(loaded.notes),
        "environment": _environment(),
    }


def _environment() -> dict[str, Any]:
    from dcp_prune.eval.environment import environment

    return dict(environment())


def _report(result: dict[str, Any], json: Path | None, show: Callable[[Console], None]) -> None:
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
def _progress(first: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, on stderr; it is gone when the work is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(first, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, description="Answering questions", completed=done, total=total)

        yield advance


def _png(image: Any) -> bytes:
    from io import BytesIO

    stream = BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


if __name__ == "__main__":
    main()
