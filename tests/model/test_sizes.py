"""The configurations of the published models build, with as many parameters as their papers say."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spikingbrain.experts import count_parameters, routers

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def built(name):
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_76b_has_76_billion_parameters_of_which_12_work_on_a_token():
    model = built("spikingbrain-76b")
    total, active = count_parameters(model)
    assert total == pytest.approx(76.06e9, rel=1e-3)
    assert active == pytest.approx(11.89e9, rel=1e-3)
    assert len(routers(model)) == 21
    blocks = [layer.mixer for layer in model.model.layers]
    assert [i + 1 for i, block in enumerate(blocks) if block.names == ["gla", "softmax"]] == [7, 14, 21, 28]
    assert all(block.names == ["gla", "sliding_window"] for i, block in enumerate(blocks) if (i + 1) % 7)
    assert all(list(block.projections) == ["q_proj", "k_proj", "v_proj", "o_proj"] for block in blocks)
    assert all(block.get_submodule(block.names[1]).sinks.shape == (128, 2, 4, 128) for block in blocks)


def test_the_7b_has_395_tensors():
    model = built("spikingbrain-7b")
    assert len(model.state_dict()) == 395
    assert count_parameters(model) == (7_616_542_976, 7_616_542_976)
