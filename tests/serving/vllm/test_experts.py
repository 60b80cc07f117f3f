"""What of the experts each rank loads: its share of every expert, or whole experts where they are parallel."""

import pytest
import torch
from conftest import relative_rms

from spikingbrain import SpikingBrainConfig
from spikingbrain.experts import run_expert
from spikingbrain.model import DecoderLayer

from .conftest import SIZES

pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

NAME = "model.layers.0"
NUM_EXPERTS, RANKS = 5, 2


def make_config():
    moe = {"num_experts": NUM_EXPERTS, "top_k": 2}
    return SpikingBrainConfig(**SIZES, channel_mixers=["moe"], moe=moe, mlp_bias=True)


@pytest.fixture
def one_process(tmp_path):
    """vLLM's groups of one process each, which FusedMoE looks for."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'init'}", 0, "gloo")
        initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()


def place_on(rank, monkeypatch, *, expert_parallel):
    """Let vLLM's experts take this process for `rank` of two."""
    from vllm.model_executor.layers.fused_moe import layer
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    parallel = FusedMoEParallelConfig.make_no_parallel()
    names = ("ep_size", "ep_rank") if expert_parallel else ("tp_size", "tp_rank")
    for name, value in zip(names, (RANKS, rank), strict=True):
        setattr(parallel, name, value)
    parallel.use_ep = expert_parallel
    monkeypatch.setattr(layer, "make_parallel_config", lambda *_args, **_options: parallel)


def load_layer(name):
    """A layer whose experts are vLLM's with the weights of a layer of ours, and that layer."""
    from spikingbrain_serving.vllm.experts import fuse_experts

    config = make_config()
    torch.manual_seed(0)
    ours = DecoderLayer(config, 0)
    with torch.device("meta"):
        theirs = DecoderLayer(config, 0)
    targets = fuse_experts(theirs, None, config, name)
    tensors = {f"{name}.{key}": tensor for key, tensor in ours.state_dict().items() if ".experts." in key}
    assert tensors.keys() == targets.keys()
    for key, tensor in tensors.items():
        assert targets[key].shape == tensor.shape
        targets[key].load(tensor.detach())
    return theirs.mlp.moe.routed.routed_experts, ours.mlp.moe.experts


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("rank", range(RANKS))
def test_an_expert_parallel_rank_has_whole_experts(rank, monkeypatch):
    place_on(rank, monkeypatch, expert_parallel=True)
    routed, experts = load_layer(NAME)
    mine = list(experts)[:3] if rank == 0 else list(experts)[3:]
    assert len(routed.w13_weight) == len(mine)
    for place, expert in enumerate(mine):
        assert torch.equal(routed.w13_weight[place], torch.cat([expert.gate_proj.weight, expert.up_proj.weight]))
        assert torch.equal(routed.w13_bias[place], torch.cat([expert.gate_proj.bias, expert.up_proj.bias]))
        assert torch.equal(routed.w2_weight[place], expert.down_proj.weight)
        assert torch.equal(routed.w2_bias[place], expert.down_proj.bias)


@pytest.mark.usefixtures("one_process")
def test_what_tensor_parallel_ranks_compute_adds_up(monkeypatch):
    x = torch.randn(7, SIZES["hidden_size"])
    for expert in range(NUM_EXPERTS):
        total = torch.zeros_like(x)
        for rank in range(RANKS):
            place_on(rank, monkeypatch, expert_parallel=False)
            routed, experts = load_layer(f"{NAME}{expert}{rank}")
            w13, b13, w2, b2 = (
                tensor[expert] for tensor in (routed.w13_weight, routed.w13_bias, routed.w2_weight, routed.w2_bias)
            )
            gate, up = (x @ w13.T + b13).chunk(2, dim=-1)
            total += (torch.nn.functional.silu(gate) * up) @ w2.T + b2
        assert relative_rms(total, run_expert(experts[expert], x)) < 1e-6
