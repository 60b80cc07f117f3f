"""The files under configs/deploy name what is there."""

import json
import re
from pathlib import Path

import pytest
import yaml

from .harness import serving

DEPLOY = Path(__file__).parents[2] / "configs" / "deploy"


@pytest.fixture(scope="module")
def served(model_dir):
    with serving(model_dir) as server:
        yield server


def metrics_on_the_board() -> set[str]:
    """Every metric that a panel asks for."""
    board = json.loads((DEPLOY / "grafana" / "serving.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"\bvllm:\w+", query)}


def exported(text: str) -> set[str]:
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line.startswith("vllm:")}


def test_the_board_shows_only_metrics_that_our_engine_exports(served):
    served.client.completions.create(model="tiny", prompt="a", max_tokens=4)
    assert metrics_on_the_board() <= exported(served.ask("/metrics")[1])
    assert len(metrics_on_the_board()) > 10


def test_the_files_that_compose_mounts_exist():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    files = [mount for mount in mounts if mount.startswith("./")]
    assert len(files) == 4
    assert all((DEPLOY / file).is_file() for file in files)
