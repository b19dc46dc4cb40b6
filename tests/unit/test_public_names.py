"""`import dcp_prune`: cheap, lazy, and every public name resolves."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dcp_prune


def test_importing_the_package_imports_no_other_package():
    # A count of modules, not of seconds, which depend on what else the machine is doing.
    code = (
        "import sys; before = set(sys.modules); import dcp_prune; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(*sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["dcp_prune"]


def test_pruners_need_torch_but_not_transformers():
    code = (
        "import sys, torch, dcp_prune; "
        "[dcp_prune.get_pruner(name) for name in dcp_prune.list_pruners()]; "
        "assert 'dcp_prune.pruners.dcp' in sys.modules; "
        "heavy = {'transformers', 'PIL', 'matplotlib', 'rich', 'cyclopts', 'scipy', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", dcp_prune.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(dcp_prune, name).__name__ == name
    assert name in dir(dcp_prune)


def test_every_lazy_name_is_public():
    assert sorted(dcp_prune._HOME_OF) == sorted(dcp_prune.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dcp_prune.nonsense
