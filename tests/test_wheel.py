"""The wheel in an environment without our sources: what is in it, and who may be called `kernels` beside it."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from spikingbrain_kernels.library import missing

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "demo-*", "*.egg-info", "__pycache__", "tests", ".*_cache", "*.so"
)
# The package of this name that transformers looks for, in the range of versions it accepts: any name can be imported,
# made into an object and used as a decorator that changes nothing.
KERNELS = """
class Anything:
    def __init__(self, *args, **options): ...
    def __call__(self, decorated): return decorated

def __getattr__(name): return type(name, (Anything,), {})
"""
METADATA = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n"


def run(*args, **options):
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source") / "source", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run(sys.executable, "-m", "pip", "wheel", source, "-w", out, *offline)
    return next(out.glob("spikingbrain-*.whl"))


@pytest.fixture
def python(wheel, tmp_path):
    """An environment with the wheel and the packages it depends on, without this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    shutil.unpack_archive(wheel, site, "zip")
    # A directory named in a .pth file is searched, its own .pth files (our editable install's) are not.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return tmp_path / "env" / "bin" / "python", site


def test_the_wheel_has_the_native_library_for_this_platform_and_any_python(wheel, python):
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert not wheel.name.endswith("-any.whl")
    executable, site = python
    assert (site / "spikingbrain_kernels" / "libnative.so").exists() == (missing() is None)
    code = "from spikingbrain_kernels.library import FILE, levels\n"
    code += "print(FILE, *(levels() if FILE.exists() else []))"
    file, *levels = run(executable, "-c", code, cwd=site.parent).split()
    assert Path(file).is_relative_to(site)
    assert missing() is not None or "baseline" in levels


def test_the_wheel_has_the_four_packages_and_all_their_files(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    for folder in ("kernels/spikingbrain_kernels", "spikingbrain", "training/spikingbrain_training"):
        ours = {
            path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".jinja")
        }
        installed = tmp_path / Path(folder).name
        assert {path for path in ours if not (installed / path).exists()} == set()
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize("with_kernels", [False, True], ids=["without-kernels", "with-kernels"])
@pytest.mark.parametrize("where", ["repository", "elsewhere"])
def test_transformers_and_the_installed_package_import(python, tmp_path, where, with_kernels):
    executable, site = python
    if with_kernels:
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text(KERNELS)
        (site / "kernels-0.18.5.dist-info").mkdir()
        (site / "kernels-0.18.5.dist-info" / "METADATA").write_text(METADATA)
    code = "from transformers import Qwen2ForCausalLM\n"
    code += "from transformers.utils import is_kernels_available\n"
    code += "import spikingbrain_serving, spikingbrain_training, spikingbrain\n"
    code += "print(is_kernels_available(), spikingbrain.__file__)"
    # From the repository its own folders come first, as for everyone who works in it.
    cwd = ROOT if where == "repository" else tmp_path
    available, file = run(executable, "-c", code, cwd=cwd).split()
    assert available == str(with_kernels)
    assert Path(file).is_relative_to(ROOT if where == "repository" else site)
