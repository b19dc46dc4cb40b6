"""The manifest that every result file carries."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import torch

from dcp_prune import environment as module
from dcp_prune.environment import environment


def test_the_manifest_is_json_and_names_the_versions_in_use():
    manifest = json.loads(json.dumps(environment()))
    assert manifest["python"] == platform.python_version()
    assert torch.__version__.startswith(manifest["packages"]["torch"].partition("+")[0])
    assert manifest["threads"] == torch.get_num_threads()
    assert manifest["cores"] >= 1
    assert manifest["cpu"]


def test_the_manifest_names_neither_the_machine_nor_its_user_nor_a_path():
    text = json.dumps(environment())
    home = str(Path.home())
    assert home not in text
    assert platform.node() not in text
    assert getpass.getuser() not in text


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert module._commit(tmp_path) is None  # no checkout
    git("init", "-q")
    assert module._commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert module._commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert module._commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"


def test_a_package_that_is_not_installed_has_no_version():
    assert module._version("no-such-distribution") is None
