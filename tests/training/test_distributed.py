"""The same loss, gradients and weights however a step is divided, and those of plain torch on separate documents."""

import shutil

import numpy as np
import pytest
import torch
from conftest import relative_rms
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from spikingbrain.files import write_json
from spikingbrain_training.config import TrainConfig
from spikingbrain_training.data import TokenDataset
from spikingbrain_training.distributed import deepspeed_config, parameter_groups
from spikingbrain_training.train import learning_rate_scale

from . import runs

BETAS = [0.9, 0.95]
# (ranks, sequences a rank holds at once, ZeRO stage, clipping); a step has four sequences and a norm above 1.
LAYOUTS = [
    (1, 4, 0, 0.0),
    (1, 2, 0, 1.0),
    (1, 1, 1, 1.0),
    (2, 2, 0, 1.0),
    (2, 2, 1, 0.0),
    (2, 1, 1, 1.0),
    (2, 1, 2, 1.0),
    (2, 2, 3, 0.0),
    (2, 1, 3, 1.0),
]


def pieces(config: TrainConfig, step: int) -> list[Tensor]:
    """The token ids of a step, cut by hand wherever a document or a row ends; each piece with its last target."""
    tokens = np.fromfile(config.data.path / "tokens.bin", "uint16").astype("int64")
    ends = set(np.fromfile(config.data.path / "documents.bin", "int64").tolist())
    length, count = config.data.sequence_length, config.batch.sequences
    dataset = TokenDataset(config.data.path, length, config.seed)
    found = []
    for number in range(step * count, (step + 1) * count):
        start = dataset.place(number) * length
        stop = start + length + 1
        cuts = [start, *(place for place in range(start + 1, stop) if place in ends), stop]
        found += [tokens[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]
    return [torch.from_numpy(piece) for piece in found if len(piece) > 1]


def plain_torch(config: TrainConfig) -> list[tuple[float, float, dict[str, Tensor], dict[str, Tensor]]]:
    """Loss, gradient norm, clipped gradients and new weights of every step; each document is read alone."""
    model = AutoModelForCausalLM.from_pretrained(config.model.init_from, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim, set()), betas=config.optim.betas)
    steps = []
    for step in range(config.steps):
        documents = pieces(config, step)
        loss = sum(document_loss(model, ids) for ids in documents) / sum(len(ids) - 1 for ids in documents)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.gradient_clipping or float("inf"))
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_scale(config.optim, step, config.steps)
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        steps.append((loss.item(), norm.item(), gradients, weights))
    return steps


def document_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return cross_entropy(model(input_ids=ids[None, :-1], use_cache=False).logits[0], ids[1:], reduction="sum")


def assert_is_plain_torch(config: TrainConfig) -> None:
    """Every loss, the first step's gradients (Adam's moment shows them) and the last weights, to 1e-5."""
    losses, norms, gradients, weights = zip(*plain_torch(config), strict=True)
    assert norms[0] > 1.0
    assert runs.losses(config.out) == pytest.approx(losses, rel=1e-5)
    reported = [row["grad_norm"] for row in runs.rows(config.out)]
    assert reported == pytest.approx(norms, rel=1e-5)
    first, last = runs.checkpoint(config.out, 1), runs.checkpoint(config.out, config.steps)
    for name, gradient in gradients[0].items():
        assert relative_rms(first[f"exp_avg/{name}"] / (1 - BETAS[0]), gradient) < 1e-5, name
    # All together: a key's bias has next to no gradient, and Adam makes steps of full size of its rounding.
    names = list(weights[-1])
    assert relative_rms(flat([last[f"master/{name}"] for name in names]), flat(weights[-1].values())) < 1e-5


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize(("ranks", "micro", "zero", "clipping"), LAYOUTS)
def test_any_division_of_a_step_is_plain_torch_on_separate_documents(make_config, ranks, micro, zero, clipping):
    optim = {"betas": BETAS, "gradient_clipping": clipping}
    config = make_config(batch={"micro": micro}, parallel={"zero": zero}, optim=optim)
    runs.train(ranks, config)
    assert_is_plain_torch(config)


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1), (2, 3)])
def test_our_model_packed_is_plain_torch_on_separate_documents(make_config, ours, ranks, zero):
    config = make_config(model={"init_from": str(ours)}, parallel={"zero": zero}, optim={"betas": BETAS})
    runs.train(ranks, config)
    assert_is_plain_torch(config)


def same_steps(config: TrainConfig, other: TrainConfig) -> None:
    """The first loss to 1e-5 and all others to 1e-4, relative; so the first gradient norm."""
    assert runs.losses(config.out)[0] == pytest.approx(runs.losses(other.out)[0], rel=1e-5)
    assert runs.losses(config.out) == pytest.approx(runs.losses(other.out), rel=1e-4)
    assert runs.rows(config.out)[0]["grad_norm"] == pytest.approx(runs.rows(other.out)[0]["grad_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def plain_run(configure, ours, tmp_path_factory) -> TrainConfig:
    """Twenty steps of our model on one rank without ZeRO, at a rate at which losses move."""
    out = tmp_path_factory.mktemp("plain") / "run"
    config = configure(out, model={"init_from": str(ours)}, batch={"micro": 4}, parallel={"zero": 0}, **LONGER)
    runs.train(1, config)
    return config


LONGER = {"steps": 20, "checkpoint": {"every": 20}, "optim": {"lr": 1e-3, "gradient_clipping": 1.0}}


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero": 1, "offload_optimizer": True},
        {"zero": 2, "activation_checkpointing": True},
        {"zero": 3, "offload_optimizer": True, "activation_checkpointing": True},
    ],
)
def test_offload_and_activation_checkpointing_change_nothing(make_config, plain_run, ours, parallel):
    config = make_config(model={"init_from": str(ours)}, batch={"micro": 1}, parallel=parallel, **LONGER)
    runs.train(2, config)
    losses = runs.losses(config.out)
    assert losses[-1] < losses[0] - 0.1
    same_steps(config, plain_run)


@pytest.mark.parametrize("zero", [0, 3])
def test_bf16_computes_in_bf16_and_keeps_parameters_in_fp32(make_config, plain_run, ours, zero):
    config = make_config(model={"init_from": str(ours)}, precision="bf16", parallel={"zero": zero}, **LONGER)
    runs.train(2, config)
    theirs = runs.losses(plain_run.out)
    assert runs.losses(config.out) != theirs
    assert runs.losses(config.out) == pytest.approx(theirs, rel=1e-2)
    # A change of the gate far below bf16's resolution of its value is kept.
    gate = "model.layers.0.mixer.gate_proj.weight"
    last = runs.checkpoint(config.out, 20)[f"master/{gate}"]
    assert last.dtype == torch.float32
    assert not torch.equal(last, last.bfloat16().float())


def test_offload_without_zero_is_refused(make_config):
    with pytest.raises(ValueError, match="offload_optimizer needs"):
        make_config(parallel={"zero": 0, "offload_optimizer": True})


def test_every_deepspeed_option_that_bites_is_written_out(make_config):
    written = deepspeed_config(make_config(batch={"micro": 1}), world_size=2)
    assert written["gradient_clipping"] == 0.0
    assert written["zero_allow_untested_optimizer"] is True
    assert written["zero_force_ds_cpu_optimizer"] is False
    assert written["gradient_accumulation_steps"] == 2
    # DeepSpeed would build an optimizer of its own, with a compiler.
    assert "optimizer" not in written


def test_matrices_decay_and_what_conversion_added_has_its_own_rate(make_config):
    config = make_config(optim={"new_lr": 7e-3})
    model = AutoModelForCausalLM.from_pretrained(config.model.init_from)
    new = {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"}
    found = {}
    for group in parameter_groups(model, config.optim, new):
        found.update({id(parameter): (group["peak_lr"], group["weight_decay"]) for parameter in group["params"]})
    for name, parameter in model.named_parameters():
        expected = (7e-3 if name in new else 1e-3, 0.1 if parameter.dim() > 1 else 0.0)
        assert found.pop(id(parameter)) == expected, name
    assert not found


@pytest.mark.parametrize("zero", [1, 3])
def test_new_parameters_move_at_their_own_rate_in_two_processes(make_config, qwen2, tmp_path, zero):
    new = "model.layers.1.mlp.up_proj.weight"
    converted = tmp_path / "converted"
    shutil.copytree(qwen2, converted)
    write_json(converted / "conversion.json", {"new_parameters": [new]})
    optim = {"lr": 1e-3, "new_lr": 2e-2, "warmup_steps": 0, "decay": "constant", "weight_decay": 0.0}
    config = make_config(model={"init_from": str(converted)}, optim=optim, parallel={"zero": zero}, steps=1)
    runs.train(2, config)
    before, after = runs.tensors(converted), runs.tensors(config.out / "model")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    # Adam's first step is as long as its rate.
    assert moved[new] == pytest.approx(2e-2, rel=1e-2)
    assert moved["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-3, rel=1e-2)
