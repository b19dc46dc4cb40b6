"""What textvqa_val_ocr.yaml takes from lmms-eval's own task."""
# pyright: reportMissingImports=false

from typing import Any

from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text, textvqa_doc_to_visual, textvqa_process_results

__all__ = ["score", "textvqa_doc_to_text", "textvqa_doc_to_visual"]


def score(doc: dict[str, Any], result: list[str]) -> dict[str, float]:
    """The VQA score of an answer, without the file for a submission."""
    return {"exact_match": textvqa_process_results(doc, result)["exact_match"]}
