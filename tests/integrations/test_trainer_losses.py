"""Losses and metrics under a Trainer, which counts labels and columns of the prompt that it handed in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dcp_prune.integrations.transformers import prune
from dcp_prune.registry import make_pruner

MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = ["USER: <image> what is the colour ASSISTANT: red", "<image> where is the cat ASSISTANT: there two"]


@pytest.fixture
def trainer(model: Any, make_inputs: MakeInputs, tmp_path: Path) -> Callable[..., Trainer]:
    def collate(numbers: list[int]) -> dict[str, Any]:
        """Labels that leave out padding only: visual tokens are among them."""
        batch = make_inputs(*(PROMPTS[number % 2] for number in numbers), seeds=numbers)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    def make(compute_metrics: Any = None, **options: Any) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path),
            **{"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.0} | options,
            report_to=[],
            remove_unused_columns=False,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        data: Any = [0, 1, 2, 3]
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=data[:2],
            data_collator=collate,
            compute_metrics=compute_metrics,
        )

    return make


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainers_loss_is_the_mean_over_the_labels_that_are_left(
    model: Any, trainer: Callable[..., Trainer], accumulated: int
) -> None:
    made = trainer(gradient_accumulation_steps=accumulated, seed=3)
    with prune(model, make_pruner("uniform", num_tokens=8)):
        told = made.train().training_loss
        model.eval()
        collate: Any = made.data_collator
        batches = [collate([number]) for number in range(4)]
        with torch.no_grad():
            alone = [(model(**batch).loss, batch["input_ids"].shape[1] - 28 - 1) for batch in batches]
    if accumulated == 2:
        expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
        assert told == pytest.approx(float(expected), rel=1e-2)
    else:
        pairs = [(one, other) for one in range(4) for other in range(one)]
        weighted = [
            float(sum(alone[n][0] * alone[n][1] for n in pair) / sum(alone[n][1] for n in pair)) for pair in pairs
        ]
        assert min(abs(told - loss) for loss in weighted) < 1e-3, "two of the four samples"


def test_a_loss_over_a_given_number_of_items_counts_those_that_are_left(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    items = (inputs["labels"][:, 1:] != -100).sum()
    with prune(model, make_pruner("uniform", num_tokens=8)), torch.no_grad():
        mean = model(**inputs).loss
        torch.testing.assert_close(model(**inputs, num_items_in_batch=items).loss, mean)
        # Half of a larger batch, of which no more is known.
        torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * items).loss, mean / 2)
        inputs["labels"] = inputs["labels"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        words = (inputs["labels"][:, 1:] != -100).sum()
        torch.testing.assert_close(model(**inputs, num_items_in_batch=words).loss, model(**inputs).loss)


def test_metrics_get_predictions_in_the_columns_of_their_labels(model: Any, trainer: Callable[..., Trainer]) -> None:
    seen: list[Any] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    with prune(model, make_pruner("uniform", num_tokens=8)) as handle:
        made = trainer(keep, per_device_eval_batch_size=2)
        told = made.evaluate(ignore_keys=["past_key_values", "image_hidden_states"])["eval_loss"]
        logits, labels = (torch.as_tensor(each) for each in (seen[0].predictions, seen[0].label_ids))
        columns = handle.last.columns
    assert logits.shape[:2] == labels.shape
    loss = mean_loss(logits, labels, columns)
    assert told == pytest.approx(float(loss), rel=1e-4)
    dropped = torch.ones(labels.shape, dtype=torch.bool).scatter(1, columns.clamp(min=0), False)
    assert (logits[dropped] == 0).all()
    assert dropped.sum() >= 2 * 28


def mean_loss(logits: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
    """The mean loss of predictions of what is left, computed from the caller's columns."""
    losses = []
    for row, kept in enumerate(columns):
        kept = kept[kept >= 0]
        losses.append(
            torch.nn.functional.cross_entropy(logits[row, kept[:-1]], labels[row, kept[1:]], reduction="none")
        )
    return torch.cat(losses).mean()
