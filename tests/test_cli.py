"""The command line: exit codes, one clear line, nothing destroyed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spikingbrain import registry
from spikingbrain_kernels import backends

SCRIPT = Path(sys.executable).parent / "spikingbrain"


def run(*args, **options):
    return subprocess.run([SCRIPT, *map(str, args)], capture_output=True, text=True, **options)


def test_doctor_says_which_backend_serves_which_op():
    done = run("doctor")
    assert done.returncode == 0
    names = [backend.name for backend in backends("gated_linear") if "cpu" in backend.devices]
    assert f"gated_linear: {', '.join(names)}" in done.stdout
    assert f"mixers: {', '.join(registry.names('mixers'))}" in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["convert", "nowhere", "out"],
        ["eval", "nowhere", "--text", __file__],
        ["spike", "nowhere", "out"],
        ["import", "nowhere", "out"],
        ["export", "nowhere", "out"],
        ["serve", "nowhere"],
        ["train", "nowhere.yaml"],
    ],
    ids=lambda args: args[0],
)
def test_bad_input_is_one_line_and_exit_code_2(args, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []


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
