"""A pruner of your own in 20 lines: it keeps the tokens that are least like their neighbours in reading order.

    python examples/own_pruner.py

prints its accuracy on held-out pictures beside that of `dcp` and `random`.
"""

from dataclasses import dataclass

from torch.nn.functional import cosine_similarity, pad

from dcp_prune import ScorePruner, register_pruner
from dcp_prune.eval.evaluate import evaluate
from dcp_prune.eval.specs import plan
from dcp_prune.testbed.load import load
from dcp_prune.testbed.seeds import HELD_OUT


@dataclass(frozen=True, kw_only=True)
class EdgePruner(ScorePruner):
    """Scores a token by how much it differs from the one before it."""

    def score(self, tokens):
        features = tokens.features.float()
        before = pad(features[:, :-1], (0, 0, 1, 0))
        return 1 - cosine_similarity(features, before, dim=2)


register_pruner("edges", EdgePruner)

model, processor = load("weak")  # the fastest model of the testbed
methods = plan(["none", "edges", "dcp", "random"], [16])
result = evaluate(model, processor, methods, HELD_OUT, limit=60, checkpoint="weak")
for answers in result.answers:
    print(f"{answers.method.name:>8}  {answers.num_tokens:>3} visual tokens  {answers.correct.mean():.0%} right")
