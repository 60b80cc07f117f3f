"""Against vLLM's real engine: greedy tokens are those of `generate`, whatever vLLM does with the requests."""

import os
import subprocess
import sys
from ast import literal_eval

import pytest
from transformers import AutoModelForCausalLM

from spikingbrain import registry
from spikingbrain.quantization import quantize_projections

from .conftest import LENGTHS, ask, engine, make_prompts, reference, save, save_family, save_qwen2, tokens_of

vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

MIXERS = registry.names("mixers")
PAIRS = [list(MIXERS[i : i + 2]) for i in range(0, len(MIXERS), 2)]
LAYOUTS = {
    **{" and ".join(pair): {"mixers": pair} for pair in PAIRS},
    "in parallel": {"mixers": ["gla+sliding_window", "gla+softmax"], "qk_norm": True, "qkv_bias": True},
    "sinks and a tied gate": {"mixers": ["gla+sliding_window", "softmax"], "num_sinks": 3, "gate": {"tied": True}},
    "experts": {"mixers": ["gla"], "channel_mixers": ["moe"], "moe": {"num_experts": 4, "top_k": 2}},
    "experts with biases, none of them shared": {
        "mixers": ["gla"],
        "channel_mixers": ["moe"],
        "moe": {"num_experts": 5, "top_k": 3, "num_shared": 0, "score": "sigmoid"},
        "mlp_bias": True,
        "hidden_act": "gelu",
    },
    "experts of a firing router": {
        "mixers": ["gla"],
        "channel_mixers": ["moe"],
        "moe": {"num_experts": 4, "top_k": 3, "num_shared": 2, "score": "spike"},
    },
    "experts that vLLM has no kernel for": {
        "mixers": ["gla"],
        "channel_mixers": ["moe"],
        "moe": {"num_experts": 4},
        "hidden_act": "relu",
    },
    "spikes, not all": {"mixers": ["gla", "sliding_window"], "spiking": {"exclude": ["v_proj"]}},
    "spikes before the head too": {"mixers": ["gla"], "spiking": {"neuron": "dead_zone", "head": True}},
    "neurons with a memory": {"mixers": ["gla"], "spiking": {"neuron": "lif", "params": {"v_th": 0.05}}},
    "states of several sizes": {
        "mixers": ["gla", "rwkv", "softmax"],
        "channel_mixers": ["swiglu", "rwkv", "swiglu"],
        "num_hidden_layers": 3,
        "lif": {},
        "norm": "layer_norm",
    },
}
# Traced as for torch.compile, and then run as it is.
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
QWEN2 = """
import sys
from serving.vllm.conftest import ask, engine, make_prompts, tokens_of
with engine(sys.argv[1]) as llm:
    outputs = ask(llm, make_prompts(211), logprobs=2)
print(repr([(tokens, output.outputs[0].cumulative_logprob) for tokens, output in zip(tokens_of(outputs), outputs)]))
"""


def check(path, prompts, rounds=3, **options):
    """Several rounds, so that slots are reused; they hold states of longer prompts when one-token prompts come."""
    expected = reference(path, prompts)
    with engine(path, **options) as llm:
        for _ in range(rounds):
            assert tokens_of(ask(llm, prompts)) == expected


@pytest.mark.parametrize("family", registry.names("families"))
def test_every_family_gives_the_tokens_of_generate(family, tmp_path):
    path = save_family(family, tmp_path / "model")
    check(path, make_prompts(61))


def kinds_of_experts(model):
    return {type(module).__name__ for module in model.modules()} & {"FusedExperts", "OpaqueMixer"}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "FusedExperts"),
        ({"spiking": {"exclude": ["gate_proj", "up_proj", "down_proj"]}}, "FusedExperts"),
        ({"spiking": {"exclude": ["gate_proj", "up_proj"]}}, "OpaqueMixer"),
    ],
)
def test_experts_that_take_no_spikes_are_vllms(settings, kind, tmp_path, prompts):
    path = save(tmp_path / "model", mixers=["softmax"], channel_mixers=["moe"], moe={"num_experts": 4}, **settings)
    with engine(path) as llm:
        assert llm.apply_model(kinds_of_experts) == [{kind}]
        assert tokens_of(ask(llm, prompts)) == reference(path, prompts)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_tokens_of_generate(layout, tmp_path, prompts):
    check(save(tmp_path / "model", **layout), prompts)


def save_int8(path):
    """Codes in int8; the projections that stay as they are have names of their own in the config."""
    model = AutoModelForCausalLM.from_pretrained(
        save(path.with_name("fp32"), mixers=["gla", "sliding_window"], spiking={"exclude": ["v_proj"]})
    )
    quantize_projections(model).save_pretrained(path)
    assert "model.layers.1.mixer.v_proj" in model.config.quantization_config["exclude"]
    return path


def numbers_of_parts(model):
    return {len(module.parts) for module in model.modules() if hasattr(module, "parts")}


@pytest.mark.parametrize(
    ("make", "parts"), [(save_int8, 1), (lambda path: save_family("w8aspike", path), 2)], ids=["int8", "codes beyond"]
)
def test_int8_weights_are_packed_and_give_the_same_tokens(make, parts, tmp_path, prompts):
    path = make(tmp_path / "model")
    with engine(path, **TRACED) as llm:
        assert llm.apply_model(numbers_of_parts) == [{parts}]
        for _ in range(2):
            assert tokens_of(ask(llm, prompts)) == reference(path, prompts)


def test_prompts_in_chunks_give_the_same_tokens(hybrid, prompts, expected):
    with engine(hybrid, max_num_batched_tokens=32, max_num_seqs=3) as llm:
        assert tokens_of(ask(llm, prompts)) == expected


def test_prefixes_are_reused_and_tokens_stay_the_same(hybrid, prompts, expected):
    # Blocks of 64 tokens, and chunks of one block, so that every block's end is kept.
    with engine(hybrid, enable_prefix_caching=True, block_size=64, max_num_batched_tokens=64) as llm:
        for cached in (0, 64, 64):
            outputs = ask(llm, prompts)
            assert tokens_of(outputs) == expected
            assert [output.num_cached_tokens for output in outputs] == [cached * (length > 64) for length in LENGTHS]


def test_several_outputs_logprobs_and_a_request_given_up(hybrid, prompts, expected):
    with engine(hybrid) as llm:
        # vLLM refuses several greedy outputs; the best one of one is the same.
        outputs = ask(llm, prompts[:3], n=3, logprobs=4, temperature=1, top_k=1)
        assert [[list(o.token_ids) for o in output.outputs] for output in outputs] == [[e] * 3 for e in expected[:3]]
        for output in outputs:
            for token, choices in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
                assert len(choices) in (4, 5)
                assert choices[token].rank == 1
        inner = llm.llm_engine
        inner.add_request("given up", {"prompt_token_ids": prompts[2]}, vllm.SamplingParams(max_tokens=100))
        for _ in range(5):
            inner.step()
        inner.abort_request(["given up"])
        assert not inner.has_unfinished_requests()
        assert tokens_of(ask(llm, prompts)) == expected


def test_a_compiled_model_gives_the_same_tokens(hybrid, prompts, expected):
    with engine(hybrid, enforce_eager=False) as llm:
        for _ in range(2):
            assert tokens_of(ask(llm, prompts)) == expected


def test_experts_in_a_traced_model_give_the_same_tokens(tmp_path, prompts):
    check(save(tmp_path / "model", **LAYOUTS["experts"]), prompts, rounds=1, **TRACED)


def test_two_ranks_give_the_same_tokens(hybrid, prompts, expected):
    with engine(hybrid, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        for _ in range(2):
            assert tokens_of(ask(llm, prompts)) == expected


def test_two_ranks_share_every_expert(tmp_path, prompts):
    path = save(tmp_path / "model", **LAYOUTS["experts with biases, none of them shared"])
    check(path, prompts, rounds=1, tensor_parallel_size=2, distributed_executor_backend="mp")


def test_two_ranks_share_int8_weights_and_codes_beyond_them(tmp_path):
    # Each rank's inputs have to be whole groups of 128.
    path = save_family("w8aspike", tmp_path / "model", hidden_size=256, intermediate_size=256)
    check(path, make_prompts(61), rounds=1, tensor_parallel_size=2, distributed_executor_backend="mp")


def test_two_stages_give_the_same_tokens(hybrid, prompts, expected):
    # Eagerly, vLLM's CPU worker never makes the buffer that a stage receives into.
    with engine(hybrid, pipeline_parallel_size=2, distributed_executor_backend="mp", **TRACED) as llm:
        for _ in range(2):
            assert tokens_of(ask(llm, prompts)) == expected


def test_another_model_behaves_as_without_the_plugin(tmp_path, prompts):
    path = save_qwen2(tmp_path / "qwen2")
    with engine(path) as llm:
        outputs = ask(llm, prompts, logprobs=2)
    ours = [o.outputs[0].cumulative_logprob for o in outputs]
    environment = {**os.environ, "VLLM_PLUGINS": "none", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", QWEN2, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, theirs = zip(*literal_eval(done.stdout.splitlines()[-1]), strict=True)
    assert list(tokens) == tokens_of(outputs) == reference(path, prompts)
    # Sums of one process and of another may differ in their last bit: memory lies otherwise.
    assert ours == pytest.approx(list(theirs), rel=1e-6)
