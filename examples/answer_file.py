"""Answers a file of questions about images in batches, with few visual tokens per image.

    python examples/answer_file.py llava-hf/llava-1.5-7b-hf questions.jsonl answers.jsonl --num-tokens 16

A line of the file is `{"image": "photos/1.png", "question": "is there a cat ?"}`, with paths relative to the file. A
line of the output is the same with an `answer`. `dcp-prune run --batch-file` does the same and
continues after a crash; for many GPUs, see vllm_on_ray.py.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dcp_prune import prune
from dcp_prune.images import load_image

parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("model", help="a folder, or a name on the hub")
parser.add_argument("questions", type=Path)
parser.add_argument("answers", type=Path)
parser.add_argument("--pruner", default="dcp")
parser.add_argument("--num-tokens", type=int, default=16)
parser.add_argument("--batch-size", type=int, default=8)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model, padding_side="left")  # answers begin where the prompts end


def prompt(question: str) -> str:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
with (
    prune(model, args.pruner, num_tokens=args.num_tokens, processor=processor),
    args.answers.open("w", encoding="utf-8") as output,
):
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        images = [load_image(args.questions.parent / row["image"]).image for row in batch]
        prompts = [prompt(row["question"]) for row in batch]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(device, dtype=model.dtype)
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(batch, answers, strict=True):
            output.write(json.dumps({**row, "answer": answer.strip()}, ensure_ascii=False) + "\n")
