"""The command line: exit codes, one clear line, nothing destroyed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spikingbrain import registry
from spikingbrain.cli import main
from spikingbrain_kernels import backends

SCRIPT = Path(sys.executable).parent / "spikingbrain"


def test_doctor_says_which_backend_serves_which_op(capfd):
    assert main(["doctor"]) == 0
    said = capfd.readouterr().out
    names = [backend.name for backend in backends("gated_linear") if "cpu" in backend.devices]
    assert f"gated_linear: {', '.join(names)}" in said
    assert f"mixers: {', '.join(registry.names('mixers'))}" in said


BAD = {
    "convert": ["nowhere", "out"],
    "eval": ["nowhere", "--text", __file__],
    "rotate": ["nowhere", "out", "--text", __file__],
    "spike": ["nowhere", "out"],
    "import": ["nowhere", "out"],
    "export": ["nowhere", "out"],
    "serve": ["nowhere"],
    "train": ["nowhere.yaml"],
}


def refuses(code: int, errors: str, directory: Path) -> None:
    assert code == 2
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    refuses(main([command, *BAD[command]]), capfd.readouterr().err, tmp_path)


def test_the_script_ends_with_the_exit_code_and_says_nothing_else(tmp_path):
    done = subprocess.run([SCRIPT, "convert", *BAD["convert"]], capture_output=True, text=True, cwd=tmp_path)
    refuses(done.returncode, done.stderr, tmp_path)


def test_ctrl_c_is_exit_code_130(tmp_path):
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    process = subprocess.Popen([SCRIPT, "convert", tmp_path, tmp_path / "out"], stderr=subprocess.PIPE, text=True)
    # The command waits for the pipe's writer; opening it says that it has got that far.
    with pipe.open("w"):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "Traceback" not in process.stderr.read()
    assert not (tmp_path / "out").exists()
