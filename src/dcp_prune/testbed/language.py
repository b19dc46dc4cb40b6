"""The words of the testbed: its tokenizers and the prompt that its models were trained on."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dcp_prune.testbed import natural
from dcp_prune.testbed.world import CLASSES, COLORS, LETTERS, NUMBERS, QUADRANTS, WORDS

PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT)
FUNCTION_WORDS = (
    "is there a in the picture ? what color left right of above below how many objects are where does sign say "
    "which one yes no b c d"
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% endif %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """Every token of the first world's models, in the order of its id."""
    return list(dict.fromkeys((*SPECIAL, *FUNCTION_WORDS, *CLASSES, *COLORS, *WORDS, *NUMBERS, *QUADRANTS, *LETTERS)))


def natural_vocabulary() -> list[str]:
    """Every token of the natural world's models, in the order of its id."""
    words = (*natural.CLASSES, *COLORS, *natural.WORDS, *natural.NUMBERS, *QUADRANTS, *LETTERS, *natural.SCENES)
    return list(dict.fromkeys((*SPECIAL, *FUNCTION_WORDS, "larger", "smaller", "than", "background", *words)))


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, whatever its case; the role names are special tokens, so they never count as question words.

    Args:
        words: every token, in the order of its id.
    """
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN))
    # The world's own questions stay as they are; people write "What colour is the cat?".
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace("colour", "color"),
            normalizers.Replace(Regex(r"[?]+"), " ? "),
            normalizers.Replace(Regex(r"[.,;:!]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def prompt(question: str) -> str:
    """The text that asks `question` about one image."""
    return f"{USER} {IMAGE} {question} {ASSISTANT}"
