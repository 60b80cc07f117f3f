"""Without a C++ compiler: the build warns and goes on, torch's path serves, and `native` by name says what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikingbrain_kernels import BackendError, library
from spikingbrain_kernels.backends import choose

ROOT = Path(__file__).parents[2]


def test_the_build_warns_and_goes_on(tmp_path):
    for part in ("setup.py", "kernels/csrc"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    absent = str(tmp_path / "no-compiler")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "CC": absent, "CXX": absent}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning: built without the native backend, a C++17 compiler is needed" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_torch_serves_and_native_by_name_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FILE", tmp_path / "libnative.so")
    uncached = choose.__wrapped__
    assert uncached("gated_linear", None, "cpu", torch.float32, True).name == "chunked"
    with pytest.raises(BackendError, match=r"native was not built: install a C\+\+17 compiler"):
        uncached("gated_linear", "native", "cpu", torch.float32, False)
