"""`vllm-args`: the command that serves a model with vLLM, pruned."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from dcp_prune.cli.common import DEFAULT_NUM_TOKENS, Text, Whole, app
from dcp_prune.errors import InvalidInputError, UnsupportedModelError


@app.command
def vllm_args(
    model: Annotated[str, Parameter(help="A model by its folder or hub name, or testbed-weak.")],
    *,
    pruner: Annotated[
        str, Parameter(help="The pruner that selects the tokens, with its options if you like: dcp(text_weight=0.5).")
    ] = "dcp",
    num_tokens: Annotated[
        int, Whole, Parameter(help="Visual tokens to keep per image. A request may ask for fewer, not for more.")
    ] = DEFAULT_NUM_TOKENS,
    text_scope: Annotated[
        str,
        Parameter(help="Which words the pruner reads: turn, prompt, or none (which caches images as stock vLLM does)."),
    ] = "turn",
    turn_end: Annotated[
        str | None,
        Text,
        Parameter(help="What ends a turn, if the chat template does not say it, such as 'ASSISTANT:'."),
    ] = None,
    max_images_per_batch: Annotated[
        int, Whole, Parameter(help="How many images the vision encoder sees at once.")
    ] = 16,
    stage1_cache_mb: Annotated[
        int, Whole, Parameter(help="Megabytes of encoded images to keep for further questions.")
    ] = 256,
    request_budgets: Annotated[
        bool, Parameter(negative=(), help="Let HTTP requests ask for fewer tokens in mm_processor_kwargs.")
    ] = False,
    metrics: Annotated[
        bool, Parameter(negative=(), help="Also report kappa, re-selections, cache hits and times at /metrics.")
    ] = False,
    architecture: Annotated[
        str | None, Parameter(help="The class of the model, if its config cannot be read here.")
    ] = None,
) -> None:
    """Print the command that serves a model with vLLM and a pruner.

    The command needs this package and vLLM in the same environment. Paste it into a shell, and add options of vLLM at
    its end.
    """
    from dcp_prune.assistant import TESTBED_MODELS
    from dcp_prune.eval.specs import QUESTION, parse_spec
    from dcp_prune.integrations.vllm import ARCHITECTURES, check_tower, pruned_architecture
    from dcp_prune.integrations.vllm.settings import Settings
    from dcp_prune.testbed.load import checkpoint_path

    spec = parse_spec(pruner)
    if spec.text != QUESTION:
        raise InvalidInputError(f"{pruner!r} has a condition on the question, which is for sweeps; leave it out")
    given: dict[str, Any] = {"text_scope": text_scope, "turn_end": turn_end, "stage1_cache_mb": stage1_cache_mb}
    settings = Settings(
        num_tokens=num_tokens,
        pruner=spec.pruner,
        options=spec.options,
        max_images_per_batch=max_images_per_batch,
        **given,
    )
    name = str(checkpoint_path(TESTBED_MODELS[model])) if model in TESTBED_MODELS else model
    found = architecture or _architecture_of(name)
    pruned = pruned_architecture(found)
    if pruned is None:
        raise UnsupportedModelError(
            f"{model} is a {found}, which cannot be pruned in vLLM so far; there are {', '.join(sorted(ARCHITECTURES))}"
        )
    check_tower(_config_of(name).get("vision_config", {}).get("model_type", ""))
    overrides = {"architectures": [pruned], "dcp_prune": settings.as_overrides()}
    words = ["vllm", "serve", name, "--hf-overrides", json.dumps(overrides)]
    if request_budgets:
        words.append("--trust-request-mm-kwargs")
    directory = "PROMETHEUS_MULTIPROC_DIR=$(mktemp -d) " if metrics else ""
    sys.stdout.write(f"{directory}{shlex.join(words)}\n")


def _config_of(model: str) -> dict[str, Any]:
    """The config in a folder; empty where there is none."""
    try:
        return json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _architecture_of(model: str) -> str:
    """Class of a model by its config, which is looked for in the folder, then in the hub's cache, then on the hub."""
    config = Path(model) / "config.json"
    try:
        if config.is_file():
            return json.loads(config.read_text(encoding="utf-8"))["architectures"][0]
        from transformers import AutoConfig

        names: Any = AutoConfig.from_pretrained(model, trust_remote_code=False).architectures
        return names[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise InvalidInputError(
            f"the config of {model} cannot be read; give the folder of the model, or its class with --architecture "
            "LlavaForConditionalGeneration"
        ) from None
