"""What is asked about each image: which words of the prompt, or other words in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers.prompt import real_columns
from dcp_prune.models import lookup_vectors
from dcp_prune.tokens import TextSpace

TextScope = Literal["after_image", "own", "last_turn", "all"]
"""Which words of its prompt ask about an image:

- `after_image`: those behind the last image of the prompt, so that all images of a prompt share a question;
- `own`: those between the image and the next one; images that follow each other without a word share what follows;
- `last_turn`: those of the user's last turn, without the marks of turns (needs the processor and its chat template);
- `all`: every word.

Where a scope holds no word, all words of the prompt are read.
"""
FindWords = Callable[[Int[Tensor, "b l"], Bool[Tensor, "b l"]], Bool[Tensor, "b l"]]
"""A scope of one's own: from `input_ids` and what of them is no padding to what is read. Placeholders and special
tokens are left out of it in any case."""
Text = str | Sequence[str | Sequence[str]]
"""Questions in place of those in the prompts: one for all, one per prompt, or one for each image of a prompt."""


@dataclass(frozen=True, eq=False)
class Question:
    """How the question about each image is found.

    Attributes:
        scope: where in the prompt.
        text: read this instead; needs the processor.
        processor: the model's processor; its tokenizer knows more special tokens than the model's config.
        space: in which terms.

    Raises:
        InvalidInputError: no such scope or space, or the processor is missing.
    """

    scope: TextScope | FindWords = "after_image"
    text: Text | None = None
    processor: Any = None
    space: TextSpace = "embeddings"

    def __post_init__(self) -> None:
        if self.space not in get_args(TextSpace):
            raise InvalidInputError(f"text_space must be one of {', '.join(get_args(TextSpace))}, got {self.space!r}")
        if not callable(self.scope) and self.scope not in get_args(TextScope):
            raise InvalidInputError(
                f"text_scope must be one of {', '.join(get_args(TextScope))} or a function of (input_ids, mask), "
                f"got {self.scope!r}"
            )
        if self.processor is not None and not hasattr(self.processor, "tokenizer"):
            raise InvalidInputError(
                f"processor= wants the model's processor, as AutoProcessor.from_pretrained gives it, got a "
                f"{type(self.processor).__name__}, which has no tokenizer of its own"
            )
        if self.scope == "last_turn" and getattr(self.processor, "chat_template", None) is None:
            raise InvalidInputError(
                "text_scope 'last_turn' needs processor=, with a chat template that says how turns are marked; "
                "pass it, or choose another scope"
            )

    def embed(
        self,
        model: Any,
        ids: Int[Tensor, "b l"],
        mask: Tensor | None,
        rows: Int[Tensor, " i"],
        places: Int[Tensor, "i n"],
        image_tokens: Sequence[int],
        device: torch.device,
    ) -> dict[str, Tensor | None]:
        """`text` and `text_mask` of `VisualTokens` for each image, or None for both if no image has a word.

        Args:
            model: its embeddings are used.
            ids: prompts. `b l`.
            mask: their padding; it may begin further left than they. `b m`.
            rows: prompt of each image. `i`.
            places: columns of its placeholders, -1 behind the last. `i n`.
            image_tokens: ids of placeholders.
            device: where the result goes.

        Raises:
            InvalidInputError: `text` fits neither the prompts nor their images, or a scope of one's own gave no mask of
                the shape of `ids`.
        """
        special = special_ids(model, self.processor).to(ids.device)
        if self.text is not None:
            found, words = self._tokenize(self.text, ids.shape[0], rows.tolist())
            found, words = found.to(ids.device), words.to(ids.device)
            return embed_words(model, found, words & ~torch.isin(found, special), device, self.space)
        real = real_columns(ids, mask)
        placeholders = torch.isin(ids, torch.tensor(image_tokens, dtype=ids.dtype, device=ids.device))
        words = ~placeholders & ~torch.isin(ids, special) & real
        found = self._find(ids, real, words, placeholders, rows, places)
        return embed_words(model, ids[rows], found, device, self.space)

    def _find(
        self,
        ids: Int[Tensor, "b l"],
        real: Bool[Tensor, "b l"],
        words: Bool[Tensor, "b l"],
        placeholders: Bool[Tensor, "b l"],
        rows: Int[Tensor, " i"],
        places: Int[Tensor, "i n"],
    ) -> Bool[Tensor, "i l"]:
        if callable(self.scope):
            own = self.scope(ids, real)
            if not isinstance(own, Tensor) or own.shape != ids.shape or own.dtype != torch.bool:
                raise InvalidInputError(
                    f"text_scope must return a bool tensor of the shape of input_ids, {tuple(ids.shape)}, saying which "
                    "words are read"
                )
            return _or_all(own.to(ids.device) & words, words)[rows]
        match self.scope:
            case "own":
                return words_behind_each(words, placeholders, rows, places)
            case "last_turn":
                return _or_all(self._last_turns(ids) & words, words)[rows]
            case "all":
                return words[rows]
        return words_behind_all(words, placeholders)[rows]

    def _tokenize(
        self, text: Text, num_rows: int, rows: Sequence[int]
    ) -> tuple[Int[Tensor, "i t"], Bool[Tensor, "i t"]]:
        """Ids of each image's question, and which of them are no padding."""
        lines = [text] * num_rows if isinstance(text, str) else list(text)
        if self.processor is None or len(lines) != num_rows:
            raise InvalidInputError(
                f"text needs the processor and one question per prompt, but got {len(lines)} question(s) for "
                f"{num_rows} prompt(s) and {'no' if self.processor is None else 'a'} processor"
            )
        counts = [rows.count(row) for row in range(num_rows)]
        asked: list[list[str]] = []
        for line, count in zip(lines, counts, strict=True):
            own = [line] * count if isinstance(line, str) else list(line)
            if len(own) != count:
                raise InvalidInputError(
                    f"text holds {len(own)} question(s) for a prompt with {count} image(s); give one for each image, "
                    "or one string for all of them"
                )
            asked.append(own)
        seen = [0] * num_rows
        ordered: list[str] = []
        for row in rows:
            ordered.append(asked[row][seen[row]])
            seen[row] += 1
        return tokenize(self.processor, ordered)

    def _last_turns(self, ids: Int[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """Columns of the last turn of the user in each prompt."""
        header, footer = turn_marks(self.processor)
        tokenizer = self.processor.tokenizer
        spans = [last_turn(tokenizer.convert_ids_to_tokens(row), header, footer) for row in ids.tolist()]
        columns = torch.arange(ids.shape[1], device=ids.device)
        start, end = torch.tensor(spans, device=ids.device).unsqueeze(-1).unbind(dim=1)
        return (columns >= start) & (columns < end)


def words_behind_all(words: Bool[Tensor, "b l"], placeholders: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
    """The words behind the last placeholder of each row; all words of a row where nothing follows (text first, image
    last)."""
    columns = torch.arange(words.shape[1], device=words.device)
    last = torch.where(placeholders, columns, -1).amax(dim=1, keepdim=True)
    return _or_all(words & (columns > last), words)


def words_behind_each(
    words: Bool[Tensor, "b l"],
    placeholders: Bool[Tensor, "b l"],
    rows: Int[Tensor, " i"],
    places: Int[Tensor, "i n"],
) -> Bool[Tensor, "i l"]:
    """The words between each image and the next; the nearest that follow where images touch; all words of its row where
    none follow."""
    columns = torch.arange(words.shape[1], device=words.device)
    behind = words[rows] & (columns > places.amax(dim=1, keepdim=True))
    segment = placeholders.cumsum(dim=1)[rows]
    nearest = segment.masked_fill(~behind, words.shape[1] + 1).amin(dim=1, keepdim=True)
    return _or_all(behind & (segment == nearest), words[rows])


def turn_marks(processor: Any) -> tuple[str, str]:
    """What a chat template writes in front of each turn of the user, and behind the last one, without white space.

    Raises:
        InvalidInputError: the template marks no turns.
    """
    marks = ("<<first>>", "<<answer>>", "<<second>>")
    turns = [
        {"role": role, "content": [{"type": "text", "text": mark}]}
        for role, mark in zip(("user", "assistant", "user"), marks, strict=True)
    ]
    written = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    parts = [_squeeze(part) for part in re.split("|".join(map(re.escape, marks)), written)]
    if len(parts) != 4:
        raise InvalidInputError(
            "the processor's chat template does not write a conversation turn by turn, so its last turn cannot be "
            "found; choose another text_scope"
        )
    first, _, second, behind = parts
    common = 0
    while common < min(len(first), len(second)) and first[-1 - common] == second[-1 - common]:
        common += 1
    header = second[len(second) - common :]
    if not header:
        raise InvalidInputError(
            "the processor's chat template does not mark where a turn of the user begins; choose another text_scope"
        )
    return header, behind


def last_turn(tokens: Sequence[str], header: str, footer: str) -> tuple[int, int]:
    """First and one past the last token between the last `header` and the `footer` behind it; the end if there is none.

    White space is ignored, since tokenizers write it in many ways. Without any header, the turn is empty.
    """
    squeezed = [_squeeze(token) for token in tokens]
    owner = [number for number, token in enumerate(squeezed) for _ in token]
    written = "".join(squeezed)
    found = written.rfind(header)
    if found < 0:
        return 0, 0
    begin = found + len(header)
    end = written.find(footer, begin) if footer else -1
    start = owner[begin] if begin < len(owner) else len(tokens)
    return start, len(tokens) if end < 0 else owner[end]


def embed_question(
    model: Any, processor: Any, texts: Sequence[str], space: TextSpace = "embeddings"
) -> tuple[Float[Tensor, "q t d"] | None, Bool[Tensor, "q t"] | None]:
    """`VisualTokens.text` and `text_mask` for these questions, one a row; None if none of them holds a word.

    Hand them on in `EncodedImages.tokens` to let a pruner read something else than the prompt's question.
    """
    ids, words = (each.to(model.device) for each in tokenize(processor, texts))
    words = words & ~torch.isin(ids, special_ids(model, processor).to(ids.device))
    made = embed_words(model, ids, words, model.device, space)
    return made["text"], made["text_mask"]


def tokenize(processor: Any, texts: Sequence[str]) -> tuple[Int[Tensor, "q t"], Bool[Tensor, "q t"]]:
    """Ids of the words of each text, and which of them are no padding."""
    lines = [torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"]).long() for text in texts]
    padded = pad_sequence(lines, batch_first=True, padding_value=-1)
    return padded.clamp(min=0), padded >= 0


def embed_words(
    model: Any,
    ids: Int[Tensor, "i l"],
    words: Bool[Tensor, "i l"],
    device: torch.device,
    space: TextSpace = "embeddings",
) -> dict[str, Tensor | None]:
    """The words, packed to the left and embedded, as `text` and `text_mask`; None if there are none."""
    longest = int(words.sum(dim=1).max().item())
    if longest == 0:
        return {"text": None, "text_mask": None}
    order = torch.argsort(words.int(), dim=1, stable=True, descending=True)[:, :longest]
    found = words.gather(1, order)
    # What is no word may be a placeholder, whose id some models have beyond the last row of their embeddings.
    text = model.get_input_embeddings()(ids.gather(1, order).masked_fill(~found, 0))
    if space == "lookup":
        text = lookup_vectors(model, text)
    return {"text": text.to(device), "text_mask": found.to(device)}


def special_ids(model: Any, processor: Any) -> Int[Tensor, " s"]:
    """Ids that are no words: of the configs, and of the tokenizer where a processor was given."""
    kinds = ("bos", "eos", "pad", "image", "video", "vision_start", "vision_end", "boi", "eoi")
    names = [f"{kind}_token_id" for kind in kinds]
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    found: set[int] = set() if processor is None else set(processor.tokenizer.all_special_ids)
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            found.update([] if value is None else value if isinstance(value, list | tuple) else [value])
    return torch.tensor(sorted(found), dtype=torch.long)


def _or_all(found: Bool[Tensor, "r l"], words: Bool[Tensor, "r l"]) -> Bool[Tensor, "r l"]:
    return torch.where(found.any(dim=1, keepdim=True), found, words)


def _squeeze(text: str) -> str:
    """Without white space, also as tokenizers write it."""
    return re.sub(r"[\s▁ĠĊĉ]|<0x0[9A]>", "", text)
