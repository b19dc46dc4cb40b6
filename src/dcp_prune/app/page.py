"""The page: what a visitor sets and sees. gradio is imported here and nowhere else."""
# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import pandas as pd
from PIL import Image

from dcp_prune.app.asking import Shown, ask, leaderboard, sweep
from dcp_prune.app.options import Option, options_of, value_of
from dcp_prune.assistant import TESTBED_MODELS, Assistant
from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.files import to_json
from dcp_prune.images import decode_image, load_image
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import list_pruners, make_pruner
from dcp_prune.testbed import natural
from dcp_prune.testbed.seeds import HELD_OUT
from dcp_prune.testbed.worlds import world_of

MAX_FILE_MB = 20
MAX_PIXELS = 25_000_000
LONGEST_QUESTION = 500
MOST_TOKENS = 256
"""Upper end of the slider."""
KEPT_FILES = 3600
"""Seconds after which gradio deletes what visitors uploaded and downloaded."""
_NO_PRUNER = "nobody"
_BUTTONS = ["fullscreen", "download"]
_PANEL: dict[str, Any] = {"interactive": False, "format": "png", "buttons": _BUTTONS}
_SIDES = ("a", "b")
_TOKEN_COLUMNS = ["token", "row", "column", "saliency", "relevance", "patches", "stands for (row,column)"]
_BOARD_COLUMNS = ["questions", "pruner", "budget", "tokens read", "score %", "kappa"]


@dataclass(frozen=True)
class Picture:
    """What one visitor asks about: pixels, a question that fits, and its answer where it is known."""

    image: Image.Image
    question: str = ""
    truth: str | None = None


class App:
    """One loaded model behind one page.

    Args:
        assistant: the model.
        results: a folder with records of sweeps, for the leaderboard.
    """

    def __init__(self, assistant: Assistant, results: Path) -> None:
        self.assistant, self.results = assistant, results
        self.folder = tempfile.TemporaryDirectory(prefix="dcp-prune-app-")
        checkpoint = TESTBED_MODELS.get(assistant.name)
        self.world = None if checkpoint is None else world_of(checkpoint)

    def another(self, seed: int | None = None) -> Picture:
        """A held-out picture of the testbed with a question."""
        world = self.world or world_of()
        scene = world.make_scene(HELD_OUT[random.randrange(100_000)] if seed is None else seed, "standard")
        question = scene.questions[0]
        return Picture(Image.fromarray(scene.image), question.text, question.answer)

    def answer(
        self, picture: Picture, question: str, num_tokens: int, names: list[str], chosen: list[dict[str, Any]]
    ) -> tuple[str, list[Shown]]:
        """The table of answers, and what each pruner kept."""
        _check(picture, question)
        pruners = [
            (name, _make(name, given, int(num_tokens)))
            for name, given in zip(names, chosen, strict=True)
            if name != _NO_PRUNER
        ]
        full, shown = ask(self.assistant, picture.image, question, pruners)
        truth = picture.truth if question == picture.question else None
        doubt = self.assistant.doubt([question], [picture.image.size])
        return _table(full, shown, truth, doubt), shown

    def files(self, shown: Shown) -> tuple[str, str]:
        """Picture and record, for download."""
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        picture, record = folder / "kept.png", folder / "record.json"
        shown.sheet.save(picture)
        record.write_text(to_json(shown.record), encoding="utf-8")
        return str(picture), str(record)


def build(app: App) -> gr.Blocks:
    """The page of an app."""
    first = app.another(HELD_OUT[0])
    with gr.Blocks(title="dcp-prune", delete_cache=(KEPT_FILES, KEPT_FILES), analytics_enabled=False) as page:
        gr.Markdown(f"# What pruning keeps\nModel: `{app.assistant.name}`. {_about(app)}")
        picture = gr.State(first)
        with gr.Row():
            with gr.Column(scale=1):
                seen = gr.Image(
                    first.image, label="Picture", interactive=False, elem_id="picture", height=300, buttons=_BUTTONS
                )
                upload = gr.File(label=f"Your own picture, at most {MAX_FILE_MB} MB", elem_id="upload", height=140)
                another = gr.Button("Another picture", elem_id="another")
                example = gr.Dropdown(list(natural.SCENES), value=None, label="Example photographs", elem_id="example")
            with gr.Column(scale=2):
                question = gr.Textbox(
                    first.question, label="Question", max_length=LONGEST_QUESTION, elem_id="question", lines=1
                )
                tokens = gr.Slider(1, MOST_TOKENS, 16, step=1, label="Visual tokens to keep", elem_id="tokens")
                with gr.Row():
                    sides = [_side("Pruner A", "dcp", "a"), _side("Pruner B", "random", "b")]
                names, chosen = [name for name, _ in sides], [given for _, given in sides]
                go = gr.Button("Ask", variant="primary", elem_id="ask")
                answers = gr.HTML(elem_id="answers")
        with gr.Tabs():
            with gr.Tab("What was kept"), gr.Row():
                panels = [_panel(side) for side in _SIDES]
            with gr.Tab("Budgets"):
                budgets = gr.Textbox("4, 8, 16, 32, 64", label="Numbers of kept tokens", elem_id="budgets")
                run = gr.Button("Measure", elem_id="sweep")
                plot = gr.LinePlot(x="tokens", y="kappa", color="pruner", title="kappa by kept tokens")
                rows = gr.Dataframe(label="Answers", interactive=False, elem_id="sweep-rows")
            with gr.Tab("Leaderboard") as tab:
                board = gr.Dataframe(headers=_BOARD_COLUMNS, interactive=False, elem_id="board", max_height=600)

        flat = [part for panel in panels for part in panel]

        def asked(picture: Picture, question: str, tokens: int, *sides: Any) -> Any:
            with _in_words():
                table, shown = app.answer(picture, question, tokens, list(sides[:2]), list(sides[2:]))
                by_side = iter(shown)
                filled = [next(by_side, None) if name != _NO_PRUNER else None for name in sides[:2]]
                return [table, *(value for each in filled for value in _filled(app, each))]

        inputs = [picture, question, tokens, *names, *chosen]
        work: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        for event in (go.click, question.submit, tokens.release):
            event(asked, inputs, [answers, *flat], api_name="ask" if event == go.click else False, **work)
        run.click(partial(_swept, app), [*inputs, budgets], [plot, rows], api_name=False, **work)
        shows = [picture, seen, question]
        another.click(lambda: _new(app.another()), None, shows, api_name=False)
        example.input(lambda name: _new(_example(name)), example, shows, api_name=False)
        upload.upload(_uploaded, [upload, question], shows, api_name=False)
        tab.select(partial(_board, app.results), None, board, api_name=False)
    return page


def launch(app: App, host: str, port: int, *, block: bool = True) -> gr.Blocks:
    """Serves the page until it is stopped; without `block`, until `close()` of what is returned."""
    page = build(app).queue(default_concurrency_limit=2, max_size=32)
    local = ["system-ui", "sans-serif"]  # the default theme would fetch its fonts from a foreign host
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=f"{MAX_FILE_MB}mb",
        theme=gr.themes.Default(font=local, font_mono=["monospace"]),
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=not block,
    )
    return page


def _about(app: App) -> str:
    if app.world is None:
        return "Drop a picture and ask."
    return f"It is small and knows {app.world.knows}; answers about other pictures mean nothing."


def _side(label: str, default: str, side: str) -> tuple[gr.Dropdown, gr.State]:
    """A pruner and its options, drawn anew when another one is picked."""
    names = list(list_pruners()) + ([_NO_PRUNER] if side == "b" else [])
    with gr.Column():
        name = gr.Dropdown(names, value=default, label=label, elem_id=f"pruner-{side}")
        given = gr.State({})
        name.change(dict, None, given, api_name=False, queue=False)
        with gr.Accordion("Options", open=False):

            @gr.render(inputs=name)
            def form(name: str) -> None:
                for option in [] if name == _NO_PRUNER else options_of(name):
                    field = _field(option)
                    keep = partial(_with, option.name)
                    field.change(keep, [given, field], given, api_name=False, show_progress="hidden")

    return name, given


def _field(option: Option) -> Any:
    kind: Any = gr.Textbox
    more: dict[str, Any] = {"value": repr(option.default)}
    if option.choices:
        kind, more = gr.Dropdown, {"choices": list(option.choices), "value": option.default}
    elif isinstance(option.default, bool):
        kind, more = gr.Checkbox, {"value": option.default}
    return kind(label=option.name, info=option.help, **more)


def _with(name: str, given: dict[str, Any], value: Any) -> dict[str, Any]:
    return {**given, name: value}


def _make(name: str, given: dict[str, Any], num_tokens: int) -> Pruner:
    typed = [(each, value_of(each, given[each.name])) for each in options_of(name) if each.name in given]
    # What was changed back is left out: giving it would switch on a group that is off by default.
    options = {each.name: value for each, value in typed if value != each.default}
    return make_pruner(name, num_tokens=num_tokens, **options)


def _panel(side: str) -> tuple[Any, ...]:
    with gr.Column():
        kept = gr.Image(label=f"Kept by {side.upper()}", elem_id=f"kept-{side}", **_PANEL)
        absorbed = gr.Image(label="Which token stands for which patch", **_PANEL)
        table = gr.Dataframe(
            headers=_TOKEN_COLUMNS, label="Kept tokens", interactive=False, elem_id=f"tokens-{side}", max_height=320
        )
        with gr.Row():
            picture = gr.DownloadButton("Picture (PNG)", elem_id=f"png-{side}")
            record = gr.DownloadButton("Record (JSON)", elem_id=f"json-{side}")
    return kept, absorbed, table, picture, record


def _filled(app: App, shown: Shown | None) -> tuple[Any, ...]:
    if shown is None:
        return None, None, [], None, None
    return shown.kept, shown.absorbed, shown.tokens, *app.files(shown)


def _table(full: dict[str, Any], shown: list[Shown], truth: str | None, doubt: str | None) -> str:
    head = "<th scope=col>" + "<th scope=col>".join(
        ["", "answer", "visual tokens", "prefill", "ms to first word", "KV KiB", "kappa", "distance", "re-selected"]
    )
    lines = [_line("full", "all tokens", full)]
    lines += [
        _line(side, f"{side.upper()}: {each.record['pruner']}", each.record)
        for side, each in zip(_SIDES, shown, strict=False)
    ]
    notes = [f"The right answer is {truth}."] if truth is not None else []
    notes += [f"Note: {doubt}."] if doubt else []
    said = "".join(f"<p>{escape(each)}</p>" for each in notes)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>{said}"


def _line(side: str, name: str, record: dict[str, Any]) -> str:
    distance, again = record.get("distance"), record.get("reselected")
    cells = {
        "answer": record["answer"],
        "count": record["num_tokens"],
        "prefill": record["prefill_tokens"],
        "ms": f"{record['milliseconds']['first_token']:.0f}",
        "kv": f"{record['kv_cache_bytes'] / 1024:,.0f}",
        "kappa": f"{record['kappa']:.4f}" if "kappa" in record else "",
        "distance": "" if distance is None else f"{distance:.3f} (threshold {record['threshold']:g})",
        "again": {None: "", True: "yes", False: "no"}[again],
    }
    body = "".join(f"<td id='{key}-{side}'>{escape(str(value))}</td>" for key, value in cells.items())
    return f"<tr><th scope=row>{escape(name)}</th>{body}</tr>"


def _swept(
    app: App, picture: Picture, question: str, tokens: int, a: str, b: str, given_a: Any, given_b: Any, budgets: str
) -> Iterator[tuple[Any, Any]]:
    with _in_words():
        _check(picture, question)
        wanted = _numbers(budgets)
        sides = [(name, given) for name, given in ((a, given_a), (b, given_b)) if name != _NO_PRUNER]
        labels = [f"{side}: {name}" for side, (name, _) in zip("AB", sides, strict=False)]
        make = [(label, partial(_make, name, given)) for label, (name, given) in zip(labels, sides, strict=True)]
        rows: list[dict[str, Any]] = []
        for row in sweep(app.assistant, picture.image, question, make, wanted):
            rows.append(row)
            frame = pd.DataFrame(rows)
            yield frame, frame


def _numbers(text: str) -> list[int]:
    try:
        found = sorted({int(each) for each in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1 or len(found) > 12:
        raise InvalidInputError("give 1 to 12 whole numbers above 0 with commas between them, such as 8, 16, 32")
    return found


def _check(picture: Picture, question: str) -> None:
    if not question.strip():
        raise InvalidInputError("the question is empty; type one")
    if len(question) > LONGEST_QUESTION:
        raise InvalidInputError(f"the question has more than {LONGEST_QUESTION} characters; shorten it")


def _new(picture: Picture) -> tuple[Any, ...]:
    return picture, picture.image, picture.question


def _example(name: str) -> Picture:
    path = natural.ASSETS / f"{name}.jpg"
    return Picture(load_image(path).image, "what is the background ?")


def _uploaded(path: str | None, question: str) -> tuple[Any, ...]:
    with _in_words():
        if path is None:
            raise InvalidInputError("the upload is empty; choose a picture")
        with Path(path).open("rb") as file:
            loaded = decode_image(file, Path(path).name, max_pixels=MAX_PIXELS)
        for remark in loaded.notes:
            gr.Info(remark)
        return _new(Picture(loaded.image, question))


def _board(folder: Path) -> list[list[Any]]:
    with _in_words():
        return leaderboard(folder)


class _in_words:  # noqa: N801
    """Shows what a visitor did wrong on the page, instead of a stack trace in the terminal."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DcpPruneError):
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
