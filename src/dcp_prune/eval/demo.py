"""The demonstration: a few held-out images, each question with all visual tokens and with a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from PIL import Image

from dcp_prune.assistant import Assistant, Reply, View
from dcp_prune.pruners.base import Pruner
from dcp_prune.testbed.seeds import HELD_OUT
from dcp_prune.testbed.world import Question
from dcp_prune.testbed.worlds import World
from dcp_prune.viz.overlay import Grid, Tile, enlarged, kept_tokens, sheet

ALL = "all"
"""Name of the unpruned model among the methods."""
QUESTIONS_PER_IMAGE = 2


@dataclass(frozen=True)
class Asked:
    """One question with the replies of all methods, `ALL` first."""

    scene: Any
    view: View
    question: Question
    replies: Mapping[str, Reply]


def run_demo(
    assistant: Assistant,
    pruners: Mapping[str, Pruner],
    images: int,
    world: World,
    difficulty: str = "standard",
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Asked, ...]:
    """Asks two questions about each of the first held-out images; the tasks take turns, so that each has its share."""
    asked: list[Asked] = []
    for seed in HELD_OUT[:images]:
        scene = world.make_scene(seed, difficulty)
        view = assistant.look(Image.fromarray(scene.image), *pruners.values())
        for _ in range(QUESTIONS_PER_IMAGE):
            task = world.tasks[len(asked) % len(world.tasks)]
            question = next(question for question in scene.questions if question.task == task)
            prompt = assistant.prompt(question.text)
            if not asked:  # the first call of each method pays for one-time work that says nothing about it
                view = assistant.look(Image.fromarray(scene.image), *pruners.values())
                for pruner in (None, *pruners.values()):
                    assistant.ask(view, prompt, pruner)
            replies = {ALL: assistant.ask(view, prompt)}
            replies |= {name: assistant.ask(view, prompt, pruner) for name, pruner in pruners.items()}
            asked.append(Asked(scene, view, question, replies))
            progress(len(asked), images * QUESTIONS_PER_IMAGE)
    return tuple(asked)


def summarise_demo(shown: tuple[Asked, ...]) -> dict[str, Any]:
    """Every answer with its kappa, length and time, and each method's totals (medians for times)."""
    questions = [
        {
            "seed": asked.scene.seed,
            "task": asked.question.task,
            "text": asked.question.text,
            "truth": asked.question.answer,
            "answers": [
                {
                    "method": name,
                    "answer": reply.text,
                    "correct": reply.word == asked.question.answer,
                    "visual_tokens": reply.visual_tokens,
                    "prefill_tokens": reply.prefill_tokens,
                    "kappa": reply.kappa,
                    "milliseconds": reply.milliseconds["first_token"],
                }
                for name, reply in asked.replies.items()
            ],
        }
        for asked in shown
    ]
    methods = []
    for place, name in enumerate(shown[0].replies):
        answers = [question["answers"][place] for question in questions]
        methods.append(
            {
                "method": name,
                "correct": sum(answer["correct"] for answer in answers),
                "questions": len(answers),
                "visual_tokens": answers[0]["visual_tokens"],
                "prefill_tokens": mean(answer["prefill_tokens"] for answer in answers),
                "kappa": mean(answer["kappa"] for answer in answers),
                "milliseconds": median(answer["milliseconds"] for answer in answers),
            }
        )
    return {"questions": questions, "methods": methods}


def draw_demo(shown: tuple[Asked, ...], model: str) -> Image.Image:
    """A contact sheet: a row for each image, and for each question what every pruner kept."""
    rows: list[list[Tile]] = []
    for number, asked in enumerate(shown):
        grid = Grid.fit(*asked.view.shape, side=216)
        if number % QUESTIONS_PER_IMAGE == 0:
            rows.append([Tile(enlarged(asked.view.image, grid), (f"held-out scene {asked.scene.seed}",))])
        for name, reply in asked.replies.items():
            if reply.record is None:
                continue
            right = reply.word == asked.question.answer
            caption = (
                asked.question.text,
                f"{name} {reply.visual_tokens}: {reply.text} ({'right' if right else 'wrong'})",
            )
            kept = kept_tokens(asked.view.image, reply.record.indices[0].tolist(), grid)
            rows[-1].append(Tile(kept, caption, right))
    totals = summarise_demo(shown)["methods"]
    score = ", ".join(f"{m['method']} {m['visual_tokens']}: {m['correct']} of {m['questions']} right" for m in totals)
    return sheet(
        rows,
        title="What the model read to answer",
        subtitle=f"{score}. Blue frame: right, orange frame: wrong. The first held-out images, not chosen.",
        footer=model,
    )
