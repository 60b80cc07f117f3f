"""A rotated model computes the same, along the principal axes; what cannot be rotated is refused."""

import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError, registry
from spikingbrain.checkpoint import load_model, load_tokenizer
from spikingbrain.cli import main
from spikingbrain.rotation import turn

from .conftest import VOCABULARY, tiny_model
from .test_tokenizers import save_fast

MOE = {"channel_mixers": ["moe"], "moe": {"num_experts": 4, "num_shared": 1, "top_k": 2, "score": "softmax"}}
# Those that read their residual stream channel by channel, in a convolution or a token shift, cannot be rotated.
TURNING = [name for name in registry.names("mixers") if name not in ("metala", "rwkv")] + ["gla+sliding_window"]


@pytest.fixture
def rows():
    return torch.randint(0, VOCABULARY, (12, 33), generator=torch.Generator().manual_seed(1))


def norms_of(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith("layernorm.weight")]


@pytest.mark.parametrize("options", [{}, MOE, {"norm": "simple_rms_norm"}, {"o_bias": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize("mixer", TURNING)
def test_every_logit_stays_and_no_gain_is_left_in_a_norm(mixer, options, rows):
    model = tiny_model([mixer], **options)
    before = model(input_ids=rows).logits
    weights = model.model.layers[0].mlp.state_dict()
    old = {name: tensor.clone() for name, tensor in weights.items()}
    turn(model, rows)
    assert relative_rms(model(input_ids=rows).logits, before) < 1e-12
    assert all(bool((norm == 1).all()) for norm in norms_of(model))
    assert any(not torch.equal(old[name], tensor) for name, tensor in weights.items())


def test_channels_are_principal_axes_the_largest_first(rows):
    model = tiny_model(["gla"], num_hidden_layers=1, channel_mixers=["swiglu"])
    shares = turn(model, rows)
    assert all(after > before for before, after in shares.values())
    seen = []
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model.model.layers[0].input_layernorm.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(input_ids=rows[:, :-1])
    outputs = {"input": 32 + 16 + 16 + 16, "post": 2 * 48}
    first, second = (x.detach().flatten(0, 1) for x in seen)
    moments = outputs["input"] * first.T @ first + outputs["post"] * second.T @ second
    energy = moments.diagonal()
    off_axis = (moments - energy.diag()).norm() / energy.norm()
    assert torch.equal(energy.sort(descending=True).indices, torch.arange(32))
    # The gate's low rank reads too.
    assert off_axis < 0.1


def test_a_directory_is_written_that_loads_and_computes_the_same(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    model = tiny_model(["gla", "sliding_window"], dtype=torch.float32, vocab_size=320, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    save_fast(tmp_path / "model")
    words = ["--text", str(tmp_path / "text.txt"), "--num-texts", "4", "--context", "16"]
    assert main(["rotate", str(tmp_path / "model"), str(tmp_path / "out"), *words]) == 0
    turned = load_model(tmp_path / "out")
    assert not turned.config.tie_word_embeddings
    ids = torch.randint(0, 300, (2, 20))
    assert relative_rms(turned(input_ids=ids).logits, model(input_ids=ids).logits) < 1e-5
    load_tokenizer(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spiking": {"neuron": "adaptive", "params": {}}}, "spikes"),
        ({"norm": "layer_norm"}, "layer_norm"),
        ({"embedding_norm": True}, "a norm before the first layer"),
        ({"spike_embedding": True}, "signs"),
        ({"channel_mixers": ["rwkv"]}, "something else"),
        ({"mixers": ["metala"]}, "something else"),
    ],
    ids=str,
)
def test_what_depends_on_the_basis_is_refused(options, reason, rows):
    with pytest.raises(InputError, match=reason):
        turn(tiny_model(options.pop("mixers", ["gla"]), **options), rows)
