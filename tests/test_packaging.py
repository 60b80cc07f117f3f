"""What is installed, what importing costs, and which way imports may run."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "kernels": "spikingbrain_kernels",
    ".": "spikingbrain",
    "training": "spikingbrain_training",
    "serving": "spikingbrain_serving",
}


def python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_spikingbrain_brings_in_only_torch_transformers_and_what_they_bring():
    code = "import sys, torch, transformers, safetensors.torch, accelerate\n"
    code += "from transformers import GenerationMixin, PreTrainedModel, AutoModelForCausalLM\n"
    code += "import transformers.modeling_layers, transformers.modeling_rope_utils\n"
    code += "before = {m.partition('.')[0] for m in sys.modules}\n"
    code += "import spikingbrain\n"
    code += "print(*sorted({m.partition('.')[0] for m in sys.modules} - before))"
    assert set(python(code).split()) <= {"spikingbrain", "spikingbrain_kernels"}


def test_importing_prints_nothing_and_starts_nothing():
    assert python("import spikingbrain, spikingbrain_kernels, spikingbrain_training, spikingbrain_serving") == ""


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_folder_of_the_first_level_is_itself_a_package(folder):
    assert folder == "." or not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder / PACKAGES[folder] / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root():
    assert python("from transformers import Qwen2ForCausalLM; print('ok')") == "ok\n"


def test_every_command_of_the_installed_script_loads():
    names = {entry.name for entry in entry_points(group="spikingbrain.commands")}
    assert {"convert", "train", "serve", "eval", "demo", "doctor", "spike", "data"} <= names
    done = subprocess.run([Path(sys.executable).parent / "spikingbrain", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in names)


def test_the_documents_name_both_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
