"""Answers a file of questions about images with engines of vLLM, one in each of several Ray actors.

    python examples/vllm_on_ray.py llava-hf/llava-1.5-7b-hf questions.jsonl --output answers.jsonl --actors 8

A line of the file is `{"id": 1, "image": "photos/1.png", "question": "is there a cat ?"}`, with paths relative to the
file; a line of the output is `{"id": 1, "answer": "yes", "prompt_tokens": 42, "actor": 0}`, or has an `error` if the
image cannot be read. The output stands there when all is answered. On a cluster, start it where `ray status` works;
this package and vLLM have to be installed on every node, and the folder of images has to be the same everywhere.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool

from dcp_prune.errors import DcpPruneError
from dcp_prune.files import write_atomically
from dcp_prune.images import load_image


class Engine:
    """One engine; it takes a batch of rows and gives as many back."""

    def __init__(self, number: int, args: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        pruned = {"architectures": [args.architecture], "dcp_prune": {"num_tokens": args.num_tokens}}
        self.number = number
        self.llm = LLM(args.model, hf_overrides=pruned, **args.engine)
        self.sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)

    def answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers, asked, chats = {}, [], []
        for row in rows:
            try:
                image = load_image(row["image"]).image
            except DcpPruneError as error:
                answers[row["id"]] = {"error": str(error)}
                continue
            content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": row["question"]}]
            asked.append(row["id"])
            chats.append([{"role": "user", "content": content}])
        # LLaVA's chat templates leave out the token that starts a text.
        starting = {"add_special_tokens": True}
        outputs = self.llm.chat(chats, self.sampling, use_tqdm=False, tokenization_kwargs=starting) if chats else []
        for name, output in zip(asked, outputs, strict=True):
            tokens = len(output.prompt_token_ids)
            answers[name] = {"answer": output.outputs[0].text.strip(), "prompt_tokens": tokens, "actor": self.number}
        return [{"id": row["id"], **answers[row["id"]]} for row in rows]


def read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {**row, "image": str(path.absolute().parent / row["image"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-tokens", type=int, default=16, help="visual tokens to keep per image")
    parser.add_argument("--architecture", default="DcpLlavaForConditionalGeneration")
    parser.add_argument("--actors", type=int, default=1, help="engines, each in an actor of its own")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--rows", type=int, default=64, help="that an actor takes at once")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--engine", type=json.loads, default={}, help="other arguments of vllm.LLM, as JSON")
    args = parser.parse_args()
    ray.init(include_dashboard=False)
    remote: Any = ray.remote(num_cpus=1, num_gpus=args.gpus)(Engine)
    pool = ActorPool([remote.remote(number, args) for number in range(args.actors)])
    rows = list(read(args.questions))
    batches = [rows[start : start + args.rows] for start in range(0, len(rows), args.rows)]
    answers = pool.map(lambda actor, rows: actor.answer.remote(rows), batches)
    write_atomically(args.output, "".join(f"{json.dumps(row)}\n" for batch in answers for row in batch).encode())


if __name__ == "__main__":
    main()
