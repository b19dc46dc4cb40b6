"""What the `dcp_prune` entry of vLLM's `hf_overrides` says: which pruner, how many tokens, whose words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from dcp_prune.budget import is_range
from dcp_prune.errors import InvalidInputError
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import Signal

TextScope = Literal["turn", "prompt", "none"]
ENTRY = "dcp_prune"
"""Key of the settings in `hf_overrides`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One server's pruning; checked at construction.

    Attributes:
        num_tokens: visual tokens to keep per image, and the most that a request may ask for.
        pruner: registered name.
        options: its other fields.
        text_scope: the words that a text-aware pruner reads for an image. `turn`: those of the image's own turn, from
            the image on, so that it stays in vLLM's caches when the conversation goes on. `prompt`: all of the prompt.
            `none`: nothing, so that images are cached whatever the question.
        turn_end: what ends a turn, such as "ASSISTANT:"; default: what the chat template writes before an answer, or
            the end-of-text token where there is no template.
        max_images_per_batch: images that the vision encoder sees at once, of which each tile is one where a model cuts
            images into tiles. vLLM counts kept tokens, so that it may hand over many more than it would of unpruned
            ones.
        stage1_cache_mb: megabytes (10^6 bytes) of encoded images that are kept for the next question about them, on the
            device of the encoder; 0 keeps none.

    Raises:
        InvalidInputError: a value that cannot be, in one sentence.
        UnknownPrunerError: no such pruner.
    """

    num_tokens: int
    pruner: str = "dcp"
    options: Mapping[str, Any] = field(default_factory=dict)
    text_scope: TextScope = "turn"
    turn_end: str | None = None
    max_images_per_batch: int = 16
    stage1_cache_mb: int = 256

    def __post_init__(self) -> None:
        if self.text_scope not in get_args(TextScope):
            raise InvalidInputError(
                f"text_scope must be one of {', '.join(get_args(TextScope))}, got {self.text_scope!r}"
            )
        if not isinstance(self.options, Mapping):
            raise InvalidInputError(f"options must be an object of the pruner's fields, got {self.options!r}")
        for name in {"num_tokens", "keep_ratio"} & set(self.options):
            raise InvalidInputError(f"options sets {name}; the budget is num_tokens beside options")
        if is_range(self.num_tokens) or self.options.get("max_distance") is not None:
            raise InvalidInputError(
                "a range of num_tokens lets the image decide how many stay, and vLLM has to know before it sees one; "
                "give num_tokens as one number, without max_distance"
            )
        if self.options.get("scope") == "tile":
            raise InvalidInputError(
                "scope 'tile' lets the size of an image decide how many visual tokens it keeps, and here num_tokens is "
                "the most that an image may have; leave scope out"
            )
        if self.turn_end is not None and (not isinstance(self.turn_end, str) or not self.turn_end.strip()):
            raise InvalidInputError(f"turn_end must be a text such as 'ASSISTANT:', got {self.turn_end!r}")
        check_whole("num_tokens", self.num_tokens, 1)
        check_whole("max_images_per_batch", self.max_images_per_batch, 1)
        check_whole("stage1_cache_mb", self.stage1_cache_mb, 0)
        pruner = self.make_pruner()
        if pruner.joint:
            raise InvalidInputError(
                f"pruner {self.pruner!r} makes the images of a batch depend on each other, and vLLM batches images of "
                "different requests; leave out the option that does so"
            )
        if pruner.text_space != "embeddings":
            raise InvalidInputError(
                f"pruner {self.pruner!r} reads the question as the language model's first layer does, which vLLM keeps "
                "in fused projections; use dcp here"
            )
        if self.text_scope == "none" and Signal.TEXT in pruner.requires:
            raise InvalidInputError(
                f"pruner {self.pruner!r} cannot choose without the question; use text_scope 'turn' or 'prompt'"
            )

    @classmethod
    def of(cls, config: Any) -> Settings:
        """The settings that `hf_overrides` put on a model's config.

        Raises:
            InvalidInputError: there are none, or a key that means nothing here.
        """
        given = getattr(config, ENTRY, None)
        example = f'--hf-overrides \'{{"architectures": [...], "{ENTRY}": {{"num_tokens": 16}}}}\''
        if not isinstance(given, Mapping):
            raise InvalidInputError(f"hf_overrides chose a pruned architecture but has no {ENTRY!r}; write {example}")
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise InvalidInputError(f"{ENTRY} has no setting {name!r}; {hint}")
        if "num_tokens" not in given:
            raise InvalidInputError(f"{ENTRY} does not say how many visual tokens to keep; write {example}")
        return cls(**given)

    def make_pruner(self, num_tokens: int | None = None) -> Pruner:
        """The pruner, for this budget or the server's."""
        return make_pruner(self.pruner, **{**self.options, "num_tokens": num_tokens or self.num_tokens})

    @cached_property
    def reads_text(self) -> bool:
        """Whether what is kept of an image depends on the question."""
        pruner = self.make_pruner()
        return self.text_scope != "none" and Signal.TEXT in pruner.requires | pruner.optional

    @cached_property
    def needs_text(self) -> bool:
        """Whether nothing can be kept of an image without a question."""
        return Signal.TEXT in self.make_pruner().requires

    @cached_property
    def fingerprint(self) -> str:
        """What the kept tokens of an image depend on, beside image, words and budget."""
        return repr(replace(self.make_pruner(), num_tokens=1))

    def budget_of(self, requested: object) -> int:
        """The budget of a request that asks for this one; None asks for the server's.

        Raises:
            InvalidInputError: no whole number, or more than the server's.
        """
        if requested is None:
            return self.num_tokens
        most = self.num_tokens
        if isinstance(requested, bool) or not isinstance(requested, int) or not 1 <= requested <= most:
            raise InvalidInputError(
                f"mm_processor_kwargs asks for num_tokens={requested!r}, but an image may have 1 to {most} visual "
                "tokens on this server; ask for less, or start the server with a larger num_tokens"
            )
        return requested

    def as_overrides(self) -> dict[str, Any]:
        """The entry that makes these settings, without what is the default anyway."""
        defaults = {each.name: each.default for each in fields(self)}
        given = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        if not self.options:
            given.pop("options", None)
        return given


def check_whole(name: str, value: object, least: int) -> None:
    """Refuses what is no whole number of at least `least`.

    Raises:
        InvalidInputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name} must be a whole number of at least {least}, got {value!r}")
