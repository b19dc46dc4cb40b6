"""Lets PyPI's torchvision be imported beside a CPU build of torch; for test environments only.

That torchvision is compiled against CUDA. Beside a CPU build of torch its C++ operators do not load, which it would
survive, but while importing it describes two of them (nms, qnms) that then do not exist, and dies. This module declares
the two, without implementations, just before. Preprocessing of pictures is plain torch and works as always; an operator
that is really called still fails.

To install it, copy it into `site-packages` and write `import torchvision_beside_cpu_torch` into a `.pth` file there.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_keep: list[Any] = []  # an operator lives as long as the library that declared it


class _BeforeMetaRegistrations(MetaPathFinder):
    """Finds nothing; it only notices when torchvision is about to describe its operators."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            _declare()


def _declare() -> None:
    import torch

    missing = [schema for name, schema in SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _keep.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in missing:
            _keep[0].define(schema)


sys.meta_path.insert(0, _BeforeMetaRegistrations())
