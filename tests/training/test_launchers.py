"""A run under DeepSpeed's own launcher, as configs/deploy/README.md has it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from . import runs

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_of_a_hostfile_train_one_run_each_started_on_its_own(make_config, tmp_path):
    file, hosts = tmp_path / "run.yaml", tmp_path / "hostfile"
    file.write_text(yaml.safe_dump(make_config(steps=3).model_dump(mode="json")))
    hosts.write_text("node-0 slots=1\nnode-1 slots=1\n")
    place = ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [BIN / "deepspeed", "--hostfile", hosts, *place]
    program = ["--no_python", "--no_local_rank", "spikingbrain", "train", file]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    nodes = [
        subprocess.Popen(
            [*command, "--node_rank", str(rank), *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert len(runs.losses(tmp_path / "run")) == 3
    files = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-3").glob("*.safetensors")}
    assert files == {"rank-0.safetensors", "rank-1.safetensors"}
