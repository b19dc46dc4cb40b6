"""Asks a model of transformers about an image, first with all visual tokens, then with few.

    python examples/prune_transformers.py llava-hf/llava-1.5-7b-hf photo.jpg "What color is the cat?" --num-tokens 16

Any model of docs/models.md will do. Without a GPU or a hub, take the model that comes with the package:

    python examples/prune_transformers.py src/dcp_prune/testbed/weights/natural photo.jpg "what color is the cat ?"
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dcp_prune import prune
from dcp_prune.images import load_image

parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("model", help="a folder, or a name on the hub")
parser.add_argument("image")
parser.add_argument("question")
parser.add_argument("--pruner", default="dcp")
parser.add_argument("--num-tokens", type=int, default=16)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
image = load_image(args.image).image
inputs = processor(images=image, text=prompt, return_tensors="pt").to(device, dtype=model.dtype)


def answer() -> str:
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


print("all visual tokens:", answer())
with prune(model, args.pruner, num_tokens=args.num_tokens, processor=processor) as handle:
    print(f"{args.num_tokens} visual tokens:", answer())
print(handle.last)
