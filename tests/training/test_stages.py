"""Each stage's loss, against a computation by hand; what stages need and refuse."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spikingbrain.errors import InputError
from spikingbrain.spiking import SpikeEncoder, collect_silence
from spikingbrain_training.config import Loss
from spikingbrain_training.data import IGNORED, TokenDataset
from spikingbrain_training.stages import make_student, make_teacher, stage_loss, step_loss

from .conftest import LENGTH, SIZES

SPIKING = {"neuron": "adaptive", "params": {"k": 3.0}, "code": "bitwise"}


@pytest.fixture
def batch(data):
    return TokenDataset(data, LENGTH, seed=3).batch([0, 1, 2])


@pytest.fixture
def models(qwen2, ours):
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (ours, qwen2)]


def by_hand(models, batch, temperature: float) -> tuple[float, float]:
    """Sums of temperature^2 * sum_v p log(p / q) and of -log q(next), token by token, documents read one at a time."""
    kl = ce = 0.0
    edges = batch.cu_seqlens.tolist()
    ids, labels = batch.inputs.flatten(), batch.labels.flatten()
    for begin, end in zip(edges, edges[1:], strict=False):
        student, teacher = (model(input_ids=ids[None, begin:end], use_cache=False).logits[0] for model in models)
        for t in range(end - begin):
            if labels[begin + t] == IGNORED:
                continue
            p, q = torch.softmax(teacher[t] / temperature, 0), torch.softmax(student[t] / temperature, 0)
            kl += temperature**2 * float((p * (p / q).log()).sum())
            ce -= float(torch.softmax(student[t], 0)[labels[begin + t]].log())
    return kl, ce


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_kl_from_teacher_to_student_plus_weighted_cross_entropy(models, batch, temperature):
    student, teacher = models
    kl, ce = by_hand(models, batch, temperature)
    assert kl > 1.0
    alone = stage_loss(student, teacher, batch, Loss(temperature=temperature))
    assert float(alone) == pytest.approx(kl, rel=1e-5)
    both = stage_loss(student, teacher, batch, Loss(temperature=temperature, ce_weight=0.3))
    assert float(both) == pytest.approx(kl + 0.3 * ce, rel=1e-5)
    plain = stage_loss(student, None, batch, Loss())
    assert float(plain) == pytest.approx(ce, rel=1e-5)


def test_a_model_that_equals_its_teacher_has_no_distillation_loss_and_the_teacher_no_gradient(models, batch):
    student, teacher = models
    assert stage_loss(student, student, batch, Loss()).item() == pytest.approx(0.0, abs=1e-4)
    stage_loss(student, teacher, batch, Loss()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_the_spike_stage_turns_spikes_on_and_gradients_pass_through(make_config, ours, qwen2, batch):
    config = make_config(stage="spike", spiking=SPIKING, model={"init_from": str(ours)}, teacher=str(qwen2))
    student = make_student(config)
    assert student.config.spiking["params"] == {"k": 3.0}
    assert any(isinstance(module, SpikeEncoder) for module in student.modules())
    dense = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor)
    loss = stage_loss(student, make_teacher(config.teacher), batch, config.loss)
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in student.named_parameters()}
    assert all(math.isfinite(norm) for norm in norms.values())
    assert all(norm > 0 for name, norm in norms.items() if name.endswith("weight")), norms


def test_only_our_models_can_spike(make_config):
    with pytest.raises(InputError, match="qwen2 model; convert it"):
        make_student(make_config(stage="spike", spiking=SPIKING))


def test_a_model_from_scratch_can_spike(make_config, ours):
    scratch = make_config(stage="spike", spiking=SPIKING, model={"init_from": str(ours / "config.json")})
    assert any(isinstance(module, SpikeEncoder) for module in make_student(scratch).modules())


def test_a_model_from_scratch_is_a_function_of_the_seed(make_config, tmp_path):
    Qwen2Config(**SIZES).to_json_file(tmp_path / "model.json")
    one, same, other = (
        make_student(make_config(model={"init_from": str(tmp_path / "model.json")}, seed=seed)) for seed in (1, 1, 2)
    )
    assert isinstance(one, Qwen2ForCausalLM)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])


def test_pressure_is_the_share_of_silence_that_is_missing_and_rises_with_the_steps(make_config, ours, batch):
    config = make_config(
        stage="spike",
        spiking={"neuron": "dead_zone", "params": {"theta": 0.4}, "code": "bitwise"},
        silence={"target": 0.9, "weight": 2.0, "ramp": 0.5},
        model={"init_from": str(ours)},
        steps=10,
    )
    assert [config.silence.wanted(step, 10) for step in (0, 4, 9)] == pytest.approx([0.18, 0.9, 0.9])
    student = make_student(config)
    with collect_silence(student) as silence:
        plain = stage_loss(student, None, batch, config.loss)
    share = float(silence.share())
    assert 0.18 < share < 0.9
    loss, pressure = step_loss(student, None, batch, config, 9)
    assert float(loss) == float(plain)
    assert float(pressure) == pytest.approx(2.0 * (0.9 - share) * batch.num_targets)
    assert float(step_loss(student, None, batch, config, 0)[1]) == 0.0
    pressure.backward()
    thetas = [p for name, p in student.named_parameters() if name.endswith("neuron.theta")]
    assert thetas
    assert all(bool(p.grad.any()) for p in thetas)


def test_a_target_of_silence_needs_a_neuron_that_can_learn_it(make_config, ours):
    model = {"init_from": str(ours)}
    with pytest.raises(InputError, match="choose from dead_zone"):
        make_student(make_config(stage="spike", spiking=SPIKING, silence={"target": 0.5}, model=model))
    with pytest.raises(ValueError, match="silence belongs to stage spike"):
        make_config(silence={"target": 0.5}, model=model)
