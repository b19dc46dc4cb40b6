"""What the task's YAML refers to; the same shape as in lmms-eval's own tasks."""

from __future__ import annotations

import os
from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    if os.environ.get("DCP_TESTBED_BROKEN") == str(doc["number"]):
        raise OSError("the picture cannot be read")
    return [] if doc["image"] is None else [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str]) -> str:
    return f"{lmms_eval_specific_kwargs['pre_prompt']}{doc['question']}{lmms_eval_specific_kwargs['post_prompt']}"
