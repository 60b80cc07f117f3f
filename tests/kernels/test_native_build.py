"""Without a C++ compiler: the build warns and goes on, torch's path serves, and `native` by name says what to do."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikingbrain_kernels import BackendError, library
from spikingbrain_kernels.backends import choose
from spikingbrain_kernels.native import attention, calls, channels, recurrent
from spikingbrain_kernels.packed import CPacked

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


def test_a_library_of_other_sources_is_refused_by_name_and_passed_over(monkeypatch):
    if library.missing() is not None:
        pytest.skip(f"native {library.missing()}")
    for found, other in ((library.VERSION, library.VERSION + 1), (1, library.VERSION)):
        monkeypatch.setattr(library, "_version", lambda _, found=found: found)
        monkeypatch.setattr(library, "VERSION", other)
        reason = f"was built from other sources (version {found}, not {other}): install this package again"
        assert library.missing() == reason
        assert choose.__wrapped__("gated_linear", None, "cpu", torch.float32, False).name == "chunked"
        with pytest.raises(BackendError, match="native was built from other sources"):
            choose.__wrapped__("gated_linear", "native", "cpu", torch.float32, False)


def test_a_library_that_does_not_say_its_version_is_the_first(tmp_path):
    if not shutil.which("cc"):
        pytest.skip("no compiler")
    (tmp_path / "old.c").write_text("void sb_baseline_linear(void) {}")
    subprocess.run(["cc", "-shared", "-o", "old.so", "old.c"], cwd=tmp_path, check=True)
    assert library._version(tmp_path / "old.so") == 1


def test_the_version_rises_with_what_the_functions_take():
    structs = [CPacked, calls.Tokens, recurrent._Recurrence, recurrent._Gradients, channels._Channels]
    structs += [attention._Attention, attention._Gradients]
    fields = [[(name, kind.__name__) for name, kind in struct._fields_] for struct in structs]
    functions = {name: [kind.__name__ for kind in kinds] for name, kinds in library.SIGNATURES.items()}
    digest = hashlib.sha256(repr((fields, functions)).encode()).hexdigest()[:12]
    assert (library.VERSION, digest) == (6, "fb3a251fa295")
