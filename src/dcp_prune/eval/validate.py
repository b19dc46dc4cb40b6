"""A planned run, checked in seconds before hours are spent: no weights are loaded.

The model is built on torch's meta device, where tensors have shapes but no content, so its adapter judges the real
thing; each pruner is tried on random features of the model's number of visual tokens.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch

from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.eval.data.jsonl import read_questions
from dcp_prune.eval.specs import ALL_TOKENS, Method, Spec, parse_spec
from dcp_prune.files import check_writable
from dcp_prune.integrations.transformers import get_adapter, supported_architectures
from dcp_prune.memory import free_memory, in_words
from dcp_prune.pruners.base import Pruner
from dcp_prune.tokens import Signal, VisualTokens

State = Literal["ok", "warning", "problem"]

TEXT_TOKENS = 64
"""Assumed length of a prompt beside the image, for the size of the key-value cache."""
BYTES_PER_RECORD = 64
"""Assumed size of one answer in the records; parquet usually needs less."""
SPARE = 0.9
"""Share of the free memory or disk that a run may take before a warning."""
HUB_TIMEOUT = 5.0
"""Seconds that the model hub has to answer."""
BENCHMARKS = "lmms_eval"
"""The package that brings the benchmarks, as it is imported."""


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Attributes:
        subject: what was looked at.
        state: `problem` means that the run would fail, or measure something else than was asked for.
        found: what is the case.
        advice: what to do about it; empty if all is well.
    """

    subject: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Plan:
    """A run that somebody means to start.

    Attributes:
        name: of the model, as it was asked for.
        model: its folder, or its hub name.
        pruners: as `eval.specs.parse_spec` reads them.
        budgets: visual tokens to keep.
        questions: how many will be asked at most; None for all of `data`.
        tasks: of the testbed or of `data`, to narrow a sweep down.
        known_tasks: of the testbed.
        benchmarks: tasks of lmms-eval; if there are any, the run is one of lmms-eval, else a sweep.
        data: questions instead of the testbed's, as `eval.data.jsonl.read_questions` reads them.
        output: folder of the records or results.
        batch_size: prompts at once.
        max_new_tokens: of an answer.
        processes: that hold a copy of the model each.
        ray: whether they are tasks of a Ray cluster.
    """

    name: str
    model: str
    pruners: tuple[str, ...]
    budgets: tuple[int, ...]
    questions: int | None = None
    tasks: tuple[str, ...] = ()
    known_tasks: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    data: Path | None = None
    output: Path | None = None
    batch_size: int = 1
    max_new_tokens: int = 16
    processes: int = 1
    ray: bool = False


def validate(plan: Plan, say: Callable[[str], None] = lambda subject: None) -> tuple[Check, ...]:
    """Looks at everything that a run depends on; never stops at the first problem.

    Args:
        plan: what is meant to run.
        say: told what is looked at next.
    """
    checks: list[Check] = []
    say("model")
    found = _find_model(plan.name, plan.model)
    checks.extend(found.checks)
    blueprint = None
    if found.config is not None:
        say("adapter")
        blueprint, check = _build(plan.name, found.config)
        checks.append(check)
    if found.complete and blueprint is not None and found.parameters:
        checks.extend(_compare_sizes(found, blueprint))
    if found.complete and found.config is not None:
        say("processor")
        checks.append(_processor(found, for_benchmarks=bool(plan.benchmarks)))
    say("pruners")
    checks.extend(_pruners(plan, blueprint))
    if plan.benchmarks:
        say("benchmarks")
        checks.extend(_benchmarks(plan.benchmarks))
    else:
        checks.append(_libraries(("polars", "filelock", *(("ray",) if plan.ray else ()))))
    checks.extend(_tasks(plan))
    answers = plan.questions
    if plan.data is not None:
        say("questions")
        check, answers = _data(plan)
        checks.append(check)
    methods = len(plan.pruners) * len(plan.budgets)
    checks.extend(
        _output(
            plan.output,
            None if answers is None else answers * methods * BYTES_PER_RECORD,
            for_benchmarks=bool(plan.benchmarks),
        )
    )
    if found.to_download:
        checks.append(_room("disk for the model", found.cache, found.to_download))
    if blueprint is not None:
        checks.append(_memory(plan, blueprint))
    return tuple(checks)


@dataclass(frozen=True)
class _Found:
    """A model as it lies there: `complete` if all files can be used, `to_download` bytes if it has to come first."""

    checks: tuple[Check, ...]
    folder: Path | None = None
    config: Path | None = None
    complete: bool = False
    parameters: int = 0
    to_download: int = 0
    cache: Path = Path()


@dataclass(frozen=True)
class _Blueprint:
    """A model without content, and what its adapter says about it."""

    model: Any
    adapter: Any
    num_tokens: int


def _find_model(name: str, source: str) -> _Found:
    path = Path(source).expanduser()
    if path.is_dir():
        return _local(path, name)
    if path.exists():
        return _Found((Check("model", "problem", f"{name} is a file", "give the folder that holds config.json"),))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return _Found(
            (
                Check(
                    "model",
                    "problem",
                    f"there is no model at {name}",
                    "give a model's folder, a hub name like org/name, or testbed",
                ),
            )
        )
    return _on_the_hub(name)


def _on_the_hub(name: str) -> _Found:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cache = Path(constants.HF_HUB_CACHE)
    try:
        return _local(Path(snapshot_download(name, local_files_only=True)), f"{name} in the cache")
    except HFValidationError as error:
        return _Found((Check("model", "problem", f"{name} is no hub name: {_cause(error)}", "write it as org/name"),))
    except (LocalEntryNotFoundError, OSError):
        pass  # not in the cache
    if constants.HF_HUB_OFFLINE:
        return _Found(
            (
                Check(
                    "model",
                    "problem",
                    f"{name} is not in the cache, and HF_HUB_OFFLINE keeps the hub out",
                    "download it first, unset HF_HUB_OFFLINE, or give a local folder",
                ),
            )
        )
    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=HUB_TIMEOUT)
        size = sum(each.size or 0 for each in info.siblings or () if _is_needed(each.rfilename))
        config = Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT))
    except GatedRepoError:
        found, advice = f"{name} is open only to those who accepted its terms", "accept them on the hub, then log in"
    except RepositoryNotFoundError:
        found, advice = f"the hub has no model {name}, or it is private", "check the name; log in if it is private"
    except HfHubHTTPError as error:
        found, advice = f"the hub refuses {name}: {_cause(error)}", "try again later, or give a local folder"
    except Exception as error:  # without a network each layer below raises kinds of its own
        found = f"{name} is not in the cache, and the hub cannot be reached ({type(error).__name__})"
        advice = "connect to the network, or copy the model here and give its folder"
    else:
        check = Check("model", "ok", f"{name} is on the hub, {in_words(size)} to download")
        return _Found((check,), config=config, to_download=size, cache=cache)
    return _Found((Check("model", "problem", found, advice),))


def _is_needed(file: str) -> bool:
    """Whether `from_pretrained` would download this file: not the same weights in other formats."""
    return "/" not in file and not file.endswith((".bin", ".pth", ".pt", ".msgpack", ".h5", ".gguf", ".md"))


def _local(folder: Path, called: str) -> _Found:
    config = folder / "config.json"
    if not config.is_file():
        return _Found(
            (Check("model", "problem", f"{called} has no config.json", "give the folder that holds config.json"),),
            folder,
        )
    problems, parameters, size = _weights(folder)
    if problems:
        advice = "fetch these files again; a download that was interrupted goes on where it stopped"
        return _Found((Check("model", "problem", f"{called}: {'; '.join(problems)}", advice),), folder, config)
    check = Check("model", "ok", f"{called}: {in_words(size)} of weights, all files complete")
    return _Found((check,), folder, config, complete=True, parameters=parameters)


def _weights(folder: Path) -> tuple[list[str], int, int]:
    """What is wrong with the weights; how many numbers they hold, 0 if that is not known; their bytes."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            by_file: dict[str, set[str]] = {}
            for tensor, file in wanted.items():
                by_file.setdefault(file, set()).add(tensor)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            return [f"{index.name} cannot be read"], 0, 0
    elif (folder / "model.safetensors").is_file():
        by_file = {"model.safetensors": set()}
    elif bins := sorted(folder.glob("pytorch_model*.bin")):
        return [], 0, sum(each.stat().st_size for each in bins)
    else:
        return ["there are no weights (model.safetensors)"], 0, 0
    problems: list[str] = []
    parameters = size = 0
    for file, tensors in sorted(by_file.items()):
        path = folder / file
        if not path.is_file():
            problems.append(f"{file} is missing")
            continue
        numbers, wrong = _open_weights(path, tensors)
        problems.extend(wrong)
        parameters += numbers
        size += path.stat().st_size
    return problems, parameters, size


def _open_weights(path: Path, tensors: set[str]) -> tuple[int, list[str]]:
    """Reads the header of one file, which says how long the file has to be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            numbers = sum(_product(file.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            pointer = raw.read(20).startswith(b"version https://git")
        if pointer:
            return 0, [f"{path.name} is a Git LFS pointer, not the file itself (git lfs pull)"]
        return 0, [f"{path.name} is cut short or damaged ({_cause(error)})"]
    missing = tensors - names
    return numbers, [f"{path.name} lacks {len(missing)} of its tensors"] if missing else []


def _build(name: str, config_file: Path) -> tuple[_Blueprint | None, Check]:
    """The model on the meta device, and its adapter."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        kind = (json.loads(config_file.read_text(encoding="utf-8")).get("architectures") or ["unknown"])[0]
        supported = supported_architectures()
        if kind not in supported:
            return None, Check(
                "adapter",
                "problem",
                f"{name} is a {kind}, which cannot be pruned",
                f"use a model of these classes: {', '.join(supported)}",
            )
        config = AutoConfig.from_pretrained(config_file.parent, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        adapter = get_adapter(model)
    except DcpPruneError as error:
        return None, Check("adapter", "problem", str(error), "")
    except Exception as error:  # a config can be wrong in any way
        return None, Check(
            "adapter", "problem", f"config.json cannot be used: {_cause(error)}", "fetch config.json again"
        )
    rows, cols = adapter.grid()
    found = f"{kind}: {rows} x {cols} = {rows * cols} visual tokens, {adapter.num_layers} encoder layers in use"
    return _Blueprint(model, adapter, rows * cols), Check("adapter", "ok", found)


def _compare_sizes(found: _Found, blueprint: _Blueprint) -> Iterator[Check]:
    wanted = sum(each.numel() for each in blueprint.model.parameters())
    if found.parameters < 0.99 * wanted:  # tied weights may be stored once
        yield Check(
            "weights",
            "problem",
            f"the files hold {found.parameters:,} numbers, the model of config.json has {wanted:,}",
            "take weights and config.json from the same place",
        )


def _processor(found: _Found, *, for_benchmarks: bool) -> Check:
    from transformers import AutoProcessor

    assert found.folder is not None
    try:
        processor: Any = AutoProcessor.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
        marker = str(getattr(processor, "image_token", "<image>"))
        ids = processor.tokenizer(marker, add_special_tokens=False)["input_ids"]
        assert hasattr(processor, "image_processor")
    except Exception as error:  # the parsers of its files each raise kinds of their own
        return Check(
            "processor",
            "problem",
            f"the processor cannot be loaded: {_cause(error)}",
            "put the processor's and tokenizer's files beside config.json",
        )
    if len(ids) != 1:
        return Check("processor", "problem", f"{marker} is {len(ids)} tokens", "use the model's own tokenizer")
    if getattr(processor, "chat_template", None) is None:
        return Check(
            "processor",
            "problem" if for_benchmarks else "warning",
            "there is no chat template",
            "save one as chat_template.jinja"
            + ("" if for_benchmarks else f"; without it prompts read USER: {marker} ... ASSISTANT:"),
        )
    return Check("processor", "ok", f"{type(processor).__name__} with a chat template")


def _pruners(plan: Plan, blueprint: _Blueprint | None) -> Iterator[Check]:
    if not plan.pruners or not plan.budgets:
        yield Check("pruner", "problem", "no pruner or no budget is named", "name at least one of each")
    fitting = []
    for budget in dict.fromkeys(plan.budgets):
        if budget < 0:
            yield Check("budget", "problem", f"{budget} visual tokens cannot be kept", "give a number from 1")
        elif budget == 0:
            yield Check("budget", "ok", "0 asks the model without any image")
        elif blueprint is not None and budget >= blueprint.num_tokens:
            more = "more than" if budget > blueprint.num_tokens else "all of"
            yield Check(
                "budget",
                "problem" if budget > blueprint.num_tokens else "warning",
                f"{budget} prunes nothing: that is {more} the image's {blueprint.num_tokens} visual tokens",
                "give fewer; the pruner none stands for all tokens",
            )
        else:
            fitting.append(budget)
    for text in dict.fromkeys(plan.pruners):
        yield _pruner(text, fitting, blueprint)


def _pruner(text: str, budgets: Sequence[int], blueprint: _Blueprint | None) -> Check:
    subject = f"pruner {text}"
    try:
        spec = parse_spec(text)
        if spec.pruner == ALL_TOKENS:
            return Check(subject, "ok", "all visual tokens")
        methods = [spec.at(0)] if spec.is_adaptive else [spec.at(budget) for budget in budgets]
    except DcpPruneError as error:
        return Check(subject, "problem", str(error), "`dcp-prune list` shows the pruners")
    if not methods:
        return Check(subject, "problem", "there is no budget left at which it would prune", "give smaller budgets")
    if blueprint is None:
        return Check(subject, "warning", "not tried, since the model is not known", "solve the model's problem first")
    return _tried(subject, spec, methods, blueprint)


def _tried(subject: str, spec: Spec, methods: Sequence[Method], blueprint: _Blueprint) -> Check:
    adapter = blueprint.adapter
    given = adapter.signals | {Signal.TEXT}
    stages: Sequence[Any] = ()
    pruner: Any = None
    for method in methods:
        pruner = method.pruner
        try:
            stages = adapter.check_stages(pruner.encoder_stages(blueprint.num_tokens, adapter.num_layers))
            needs = pruner.requires.union(*(stage.requires for stage in stages))
            adapter.check_signals(type(pruner).__name__, needs)
            if stages and not adapter.prunes_in_encoder:
                return Check(
                    subject,
                    "problem",
                    "it has stages inside the encoder, where this model's adapter cannot prune",
                    "use a pruner without stages",
                )
            pruner(_random_tokens(pruner, blueprint))
        except DcpPruneError as error:
            return Check(subject, "problem", f"at {method.num_tokens} tokens: {error}", "")
    used = [signal.value for signal in Signal if signal in (pruner.requires | pruner.optional) & given]
    reads = f"reads {', '.join(used)}" if used else "reads the features only"
    inside = f", {len(stages)} stages inside the encoder" if stages else ""
    lacking = [signal.value for signal in Signal if signal in pruner.optional - given]
    without = f", does without {', '.join(lacking)}" if lacking else ""
    counts = ", ".join(f"{'up to ' * method.is_adaptive}{method.num_tokens}" for method in methods)
    return Check(subject, "ok", f"{reads}{without}{inside}; keeps {counts} of {blueprint.num_tokens}")


def _random_tokens(pruner: Pruner, blueprint: _Blueprint) -> VisualTokens:
    """Features and signals that a pruner of this model might see; after stages there are fewer, which it must bear."""
    n, width = blueprint.num_tokens, 16
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    share = normal(1, n).softmax(dim=1)
    signals = blueprint.adapter.signals
    return VisualTokens.from_features(
        normal(1, n, width),
        grid=blueprint.adapter.grid(),
        encoder_features=normal(1, n, width) if Signal.ENCODER_FEATURES in signals else None,
        cls_attention=share if Signal.CLS_ATTENTION in signals else None,
        keys=normal(1, n, width) if Signal.KEYS in signals else None,
        values=normal(1, n, width) if Signal.VALUES in signals else None,
        cls_value_affinity=share if Signal.CLS_VALUE_AFFINITY in signals else None,
        clip_similarity=share if Signal.CLIP_SIMILARITY in signals else None,
        text=normal(1, 4, width),
    )


def _benchmarks(names: Sequence[str]) -> Iterator[Check]:
    spec = importlib.util.find_spec(BENCHMARKS)
    if spec is None or not spec.submodule_search_locations:
        yield Check(
            "benchmarks",
            "problem",
            "lmms-eval is not installed",
            "run: pip install 'dcp-prune[lmms-eval]', in an environment of its own",
        )
        return
    known = _known_benchmarks(Path(next(iter(spec.submodule_search_locations))) / "tasks")
    unknown = [name for name in names if name not in known]
    for name in unknown:
        near = get_close_matches(name, known, n=3)
        yield Check(
            "benchmarks",
            "problem",
            f"lmms-eval has no task {name}",
            f"did you mean {' or '.join(near)}?" if near else "lmms-eval --tasks list shows them",
        )
    if not unknown:
        yield Check("benchmarks", "ok", f"lmms-eval knows {', '.join(names)}")


def _known_benchmarks(folder: Path) -> set[str]:
    """Names of tasks and groups, read from their files: importing lmms-eval takes half a minute."""
    pattern = re.compile(r"^\s*-?\s*(?:task|group|tag)\s*:\s*['\"]?([\w.\-]+)['\"]?\s*$", re.MULTILINE)
    names: set[str] = set()
    for file in [*folder.rglob("*.yaml"), *folder.rglob("*.yml")]:
        names.update(pattern.findall(file.read_text(encoding="utf-8", errors="replace")))
    return names


def _libraries(names: Sequence[str]) -> Check:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extra = "ray" if missing == ["ray"] else "eval"
        found = f"a sweep needs {' and '.join(missing)}, which is not installed"
        return Check("libraries", "problem", found, f"run: pip install 'dcp-prune[{extra}]'")
    return Check("libraries", "ok", f"{', '.join(names)} are installed")


def _tasks(plan: Plan) -> Iterator[Check]:
    if not plan.tasks or plan.data is not None:
        return
    for name in plan.tasks:
        if name not in plan.known_tasks:
            near = get_close_matches(name, plan.known_tasks, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(plan.known_tasks)}"
            yield Check("task", "problem", f"the testbed has no task {name}", advice)
    if all(name in plan.known_tasks for name in plan.tasks):
        yield Check("task", "ok", ", ".join(plan.tasks))


def _data(plan: Plan) -> tuple[Check, int | None]:
    """The file of questions, and how many of them will be asked."""
    assert plan.data is not None
    try:
        questions = read_questions(plan.data)
    except InvalidInputError as error:
        return Check("questions", "problem", str(error)), None
    tasks = dict.fromkeys(question.task for question in questions)
    unknown = [task for task in plan.tasks if task not in tasks]
    if unknown:
        found = f"{plan.data} has no question of the task {unknown[0]}"
        return Check("questions", "problem", found, f"it has {', '.join(tasks)}"), None
    asked = [question for question in questions if not plan.tasks or question.task in plan.tasks][: plan.questions]
    images = len({question.image for question in asked})
    return Check("questions", "ok", f"{len(asked):,} questions about {images:,} images"), len(asked)


def _output(folder: Path | None, size: int | None, *, for_benchmarks: bool) -> Iterator[Check]:
    if folder is None:
        if for_benchmarks:  # lmms-eval has its own option for that
            return
        yield Check("output", "warning", "no folder for the results is named", "give --output")
        return
    there = folder.exists()
    if there and not folder.is_dir():
        yield Check("output", "problem", f"{folder} is a file", "give the name of a folder")
        return
    place = folder if there else folder.absolute().parent
    try:
        check_writable(place / ".probe")
    except InvalidInputError as error:
        yield Check("output", "problem", str(error), "")
        return
    if there and any(folder.iterdir()):
        yield Check(
            "output", "warning", f"{folder} is not empty", "only records of the same questions are gone on with"
        )
    yield _room("disk for records", place, size or 0)


def _room(subject: str, place: Path, needed: int) -> Check:
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    found = f"about {in_words(needed)} needed, {in_words(free)} free at {place}"
    if needed > free:
        return Check(subject, "problem", found, "make room, or choose another disk")
    if needed > SPARE * free or free < 2**28:
        return Check(subject, "warning", found, "make room; this is tight")
    return Check(subject, "ok", found)


def _memory(plan: Plan, blueprint: _Blueprint) -> Check:
    config = blueprint.model.config
    text: Any = config.get_text_config(decoder=True)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    weights = sum(each.numel() for each in blueprint.model.parameters()) * dtype.itemsize
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    length = blueprint.num_tokens + TEXT_TOKENS + plan.max_new_tokens
    cache = plan.batch_size * length * text.num_hidden_layers * 2 * heads * width * dtype.itemsize
    working = plan.batch_size * length * (4 * text.hidden_size + 3 * text.intermediate_size) * dtype.itemsize
    needed = plan.processes * (weights + cache + working)
    on_gpu = torch.cuda.is_available()
    device, free = "on the GPU" if on_gpu else "in main memory", free_memory("cuda" if on_gpu else "cpu")
    copies = f"{plan.processes} processes with " if plan.processes > 1 else ""
    found = (
        f"about {in_words(needed)} needed ({copies}weights {in_words(weights)} in {str(dtype).removeprefix('torch.')}, "
        f"KV cache {in_words(cache)} without pruning), {in_words(free)} free {device}"
    )
    if needed > free:
        return Check("memory", "problem", found, "use fewer processes, a smaller batch or a larger machine")
    if needed > SPARE * free:
        return Check("memory", "warning", found, "a smaller batch or fewer processes leave more room")
    return Check("memory", "ok", found)


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _cause(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
