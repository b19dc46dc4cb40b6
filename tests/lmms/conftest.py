"""These tests need lmms-eval and so an environment of their own: `make test-lmms-eval`; elsewhere they are not seen."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    version("lmms_eval")
    collect_ignore_glob = []
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
