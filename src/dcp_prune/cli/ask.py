"""Ask about images: `demo`, `run` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from dcp_prune.cli.common import (
    DEFAULT_NUM_TOKENS,
    ImageFile,
    Json,
    KeepRatio,
    Model,
    NumTokens,
    PrunerName,
    Text,
    Whole,
    app,
    build_pruner,
    check_outputs,
    environment_now,
    load_assistant,
    note,
    png_bytes,
    progress_bar,
    report_result,
)
from dcp_prune.errors import InvalidInputError
from dcp_prune.files import write_atomically

if TYPE_CHECKING:
    from dcp_prune.assistant import Assistant, Reply, View
    from dcp_prune.images import LoadedImage

DEMO_PICTURE = Path("demo/kept.png")
"""The one output whose folder is made if need be."""


@app.command
def demo(
    *,
    output: Annotated[Path, Parameter(help="Where to write the picture of the kept tokens (PNG).")] = DEMO_PICTURE,
    num_tokens: Annotated[int, Whole, Parameter(help="Visual tokens to keep.")] = DEFAULT_NUM_TOKENS,
    images: Annotated[int, Whole, Parameter(help="How many images to ask about. Each gets two questions.")] = 6,
    crowded: Annotated[
        bool, Parameter(negative="", show_default=False, help="Draw about twice as many objects into each image.")
    ] = False,
    model: Model = "testbed",
    json: Json = None,
) -> None:
    """See it work: a trained model answers questions with all visual tokens and with a few.

    The program draws the images, and the model has never seen them. They are the first ones of the held-out seeds, so
    nobody chose them for their results.
    """
    from dcp_prune.registry import make_pruner

    if images < 1:
        raise InvalidInputError(f"--images must be at least 1, got {images}")
    pruners = {name: make_pruner(name, num_tokens=num_tokens) for name in ("dcp", "random")}
    new_folder = output == DEMO_PICTURE and not output.parent.exists()
    check_outputs(output.parent if new_folder else output, json, inputs=(model,))

    from dcp_prune.assistant import TESTBED_MODELS
    from dcp_prune.eval.demo import draw_demo, run_demo, summarise_demo
    from dcp_prune.testbed.worlds import world_of

    with progress_bar("Loading the model") as advance:
        assistant = load_assistant(model)
        world = world_of(TESTBED_MODELS.get(model, model))
        shown = run_demo(assistant, pruners, images, world, "crowded" if crowded else "standard", progress=advance)
    summary = summarise_demo(shown)
    output.parent.mkdir(exist_ok=True)
    write_atomically(output, png_bytes(draw_demo(shown, assistant.name)))
    result = {"model": assistant.name, "picture": str(output), **summary, "environment": environment_now()}

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

    report_result(result, json, show)


@app.command
def run(
    *,
    image: Annotated[Path | None, Parameter(help="An image file, of any size and kind.")] = None,
    question: Annotated[str | None, Text, Parameter(help="Your question about the image.")] = None,
    prompt: Annotated[
        str | None,
        Text,
        Parameter(help="The whole prompt, with `<image>` where the image belongs, instead of a question."),
    ] = None,
    model: Model = "testbed",
    pruner: PrunerName = "dcp",
    num_tokens: NumTokens = None,
    keep_ratio: KeepRatio = None,
    max_new_tokens: Annotated[int, Whole, Parameter(help="The longest answer, in tokens.")] = 32,
    batch_file: Annotated[
        Path | None,
        Parameter(
            help="Many questions instead of one: JSON lines with the keys image and question, and id if you like."
        ),
    ] = None,
    output: Annotated[
        Path | None, Parameter(help="For --batch-file: where the answers go, as JSON lines in the same order.")
    ] = None,
    batch_size: Annotated[int, Whole, Parameter(help="For --batch-file: questions to answer at once.")] = 8,
    json: Json = None,
) -> None:
    """Ask one question about one image, or all questions of a file. With the pruner `none`, the model reads all visual
    tokens.

    If a run with --batch-file was stopped, run the same command again: it goes on where it was. OUTPUT.errors lists the
    lines that are no questions.
    """
    if batch_file is not None:
        if image is not None or question is not None or prompt is not None:
            raise InvalidInputError(
                "--batch-file holds images and questions; leave --image, --question and --prompt out"
            )
        if output is None:
            raise InvalidInputError("--batch-file needs --output, the file for the answers")
        _run_file(batch_file, output, model, pruner, num_tokens, keep_ratio, max_new_tokens, batch_size, json)
        return
    if image is None:
        raise InvalidInputError("give --image with a question, or --batch-file")
    if output is not None:
        raise InvalidInputError("--output is for the answers of --batch-file; use --json for a single question")
    loaded = _checked(image, question, prompt, model, json)
    chosen = None if pruner == "none" else build_pruner(pruner, num_tokens, keep_ratio)
    assistant, text = _loaded(question, prompt, model)
    view = assistant.look(loaded.image, chosen)
    reply = assistant.ask(view, text, chosen, max_new_tokens=max_new_tokens)
    _say_doubt(assistant, question, loaded)

    def show(console: Console) -> None:
        console.print(reply.text, highlight=False, markup=False)
        console.print(
            f"[{reply.visual_tokens} of {view.num_tokens} visual tokens, "
            f"{reply.prefill_tokens} tokens to prefill, kappa {reply.kappa:.2f}, "
            f"{reply.milliseconds['first_token']:.0f} ms to the first word]",
            style="dim",
            markup=False,
            highlight=False,
        )

    report_result(_as_json(assistant, pruner, loaded, question or text, view, reply), json, show)


def _run_file(
    batch_file: Path,
    output: Path,
    model: str,
    pruner: str,
    num_tokens: int | None,
    keep_ratio: float | None,
    max_new_tokens: int,
    batch_size: int,
    json: Path | None,
) -> None:
    chosen = None if pruner == "none" else build_pruner(pruner, num_tokens, keep_ratio)
    check_outputs(json, inputs=(batch_file, output, model))
    from dcp_prune.eval.answers import answer_file

    with progress_bar("Reading the questions") as advance:
        done = answer_file(
            batch_file,
            output,
            lambda: load_assistant(model),
            chosen,
            model=model,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=advance,
        )
    errors = output.with_name(f"{output.name}.errors")
    if done.faults:
        note(f"{len(done.faults)} lines could not be asked; {errors} says why")
    rate = done.new / done.seconds if done.seconds else None
    result = {
        "model": model,
        "pruner": pruner,
        "output": str(output),
        "questions": done.questions,
        "new": done.new,
        "answers_per_second": rate,
        "errors": len(done.faults),
        "environment": environment_now(),
    }

    def show(console: Console) -> None:
        speed = "" if rate is None else f", {rate:.1f} a second"
        console.print(f"{done.new} new answers{speed}. All answers: {output}", highlight=False, markup=False)

    report_result(result, json, show)


@app.command
def inspect(
    *,
    image: ImageFile,
    question: Annotated[str | None, Text, Parameter(help="Your question about the image.")] = None,
    prompt: Annotated[
        str | None,
        Text,
        Parameter(help="The whole prompt, with `<image>` where the image belongs, instead of a question."),
    ] = None,
    output: Annotated[Path, Parameter(help="Where to write the picture (PNG).")] = Path("kept.png"),
    model: Model = "testbed",
    pruner: PrunerName = "dcp",
    num_tokens: NumTokens = None,
    keep_ratio: KeepRatio = None,
    max_new_tokens: Annotated[int, Whole, Parameter(help="The longest answer, in tokens.")] = 32,
    json: Json = None,
) -> None:
    """Draw what a pruner kept: the image, its saliency, the kept tokens, and which token stands for which patch."""
    loaded = _checked(image, question, prompt, model, json, output)
    chosen = build_pruner(pruner, num_tokens, keep_ratio)
    assistant, text = _loaded(question, prompt, model)
    view = assistant.look(loaded.image, chosen)
    full = assistant.ask(view, text, max_new_tokens=max_new_tokens)
    reply = assistant.ask(view, text, chosen, max_new_tokens=max_new_tokens)
    _say_doubt(assistant, question, loaded)

    import numpy as np

    from dcp_prune.viz.overlay import inspection

    result = _as_json(assistant, pruner, loaded, question or text, view, reply)
    total = view.num_tokens
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
    write_atomically(output, png_bytes(picture))

    def show(console: Console) -> None:
        console.print(reply.text, highlight=False, markup=False)
        console.print(
            f"[{reply.visual_tokens} of {total} visual tokens, kappa {reply.kappa:.2f}; with all: {full.text}]",
            style="dim",
            markup=False,
            highlight=False,
        )
        console.print(f"The picture: {output}", highlight=False, markup=False)

    report_result({**result, "answer_all_tokens": full.text, "picture": str(output)}, json, show)


def _checked(image: Path, question: str | None, prompt: str | None, model: str, *outputs: Path | None) -> LoadedImage:
    """The image; whatever can be refused at once is refused here, before anything that takes seconds to load."""
    from dcp_prune.eval.data.files import LONGEST_QUESTION
    from dcp_prune.images import load_image

    if (question is None) == (prompt is None):
        raise InvalidInputError("give either --question or --prompt")
    if question is not None and not question.strip():
        raise InvalidInputError(
            'the question is empty; ask something, for example --question "what color is the cat ?"'
        )
    for option, words in (("--question", question), ("--prompt", prompt)):
        if words is not None and len(words) > LONGEST_QUESTION:
            raise InvalidInputError(f"{option} has {len(words):,} characters; {LONGEST_QUESTION:,} are the most")
    check_outputs(*outputs, inputs=(image, model))
    loaded = load_image(image)
    for remark in loaded.notes:
        note(remark)
    return loaded


def _loaded(question: str | None, prompt: str | None, model: str) -> tuple[Assistant, str]:
    """Model and prompt."""
    if prompt is not None:
        from dcp_prune.assistant import check_placeholders

        check_placeholders(prompt)
    with progress_bar("Loading the model"):
        assistant = load_assistant(model)
    text = prompt if prompt is not None else assistant.prompt(question or "")
    return assistant, text


def _say_doubt(assistant: Assistant, question: str | None, loaded: LoadedImage) -> None:
    doubt = assistant.doubt([question or ""], [loaded.image.size])
    if doubt:
        note(doubt)


def _as_json(
    assistant: Assistant, pruner: str, loaded: LoadedImage, question: str, view: View, reply: Reply
) -> dict[str, Any]:
    record = reply.record
    total = view.num_tokens
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
        "milliseconds": reply.milliseconds,
        "grid": list(view.shape),
        "indices": everything if record is None else record.indices[0].tolist(),
        "assignment": everything if record is None else record.assignment[0].tolist(),
        "notes": list(loaded.notes),
        "environment": environment_now(),
    }
