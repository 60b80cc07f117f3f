"""With packed weights every mixer, neuron and family gives the tokens of `generate`, whatever the engine does to it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from model.test_families import RELEASES
from model.test_interchange import release

from spikingbrain import registry
from spikingbrain.interchange import import_release
from spikingbrain_kernels.library import missing
from spikingbrain_serving import LLM, Extras, SamplingParams
from spikingbrain_serving.state_file import StoredState, read_state, write_state

from .conftest import generate, save_model
from .test_engine import drain, tokens_of

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")

NUM_TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LAYOUTS = [*registry.names("mixers"), "gla+sliding_window"]
SETTINGS = {"max_num_seqs": 2, "max_num_batched_tokens": 5, "preempt_after": 4, "max_model_len": 64}
NAMES = [
    *(f"mixer {name}" for name in LAYOUTS),
    *(f"channel mixer {name}" for name in registry.names("channel_mixers")),
    *(f"neuron {name}" for name in registry.names("neurons")),
    *(f"family {name}" for name in registry.names("families")),
    "head adaptive",
    "dtype bfloat16",
]
CONTINUE = """
import json, pathlib, sys
from spikingbrain_serving import LLM, Extras, SamplingParams
from spikingbrain_serving.state_file import read_state
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
for path, dtype, file in json.load(sys.stdin):
    engine = LLM(path, max_model_len=64, dtype=dtype).engine
    state = read_state(pathlib.Path(file), engine.identity)
    engine.add_request("r", state.tokens, params, Extras(resume=state.snapshot))
    tokens = []
    while engine.has_work:
        tokens += [token for new in engine.step() for token in new.outputs[0].token_ids]
    sys.stdout.write(json.dumps(tokens) + "\\n")
"""


class Case(NamedTuple):
    """A model, prompts that it can read, and what `generate` says after each."""

    path: Path
    dtype: str
    prompts: list[list[int]]
    expected: list[list[int]]

    def llm(self) -> LLM:
        return LLM(self.path, dtype=self.dtype, **SETTINGS)


def build(name: str, path: Path, tokenizer) -> None:
    kind, value = name.rsplit(" ", 1)
    if kind == "family":
        if value == "w8aspike":
            release(path / "release")
        import_release(RELEASES.get(value, path / "release"), path / "model")
        tokenizer.save_pretrained(path / "model")
        return
    settings = {
        "mixer": {"mixers": [value], "channel_mixers": ["rwkv" if value == "rwkv" else "swiglu"]},
        "channel mixer": {"channel_mixers": [value]},
        "neuron": {"spiking": {"neuron": value}},
        "head": {"spiking": {"neuron": value, "head": True}},
        "dtype": {},
    }
    save_model(path / "model", tokenizer, num_hidden_layers=2, **settings[kind])


@pytest.fixture(scope="module")
def case(tmp_path_factory, tokenizer):
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            directory = tmp_path_factory.mktemp("case")
            build(name, directory, tokenizer)
            path, dtype = directory / "model", "bfloat16" if name == "dtype bfloat16" else "float32"
            vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
            prompts = [[(5 + 7 * i * i) % vocabulary for i in range(length)] for length in (19, 1, 13)]
            expected = generate(path, prompts, NUM_TOKENS, ignore_eos=True, dtype=dtype)
            cases[name] = Case(path, dtype, prompts, expected)
        return cases[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_batches_chunks_preemption_and_reuse_change_no_token(case, name):
    model = case(name)
    llm = model.llm()
    assert tokens_of(llm.generate(model.prompts, GREEDY)) == model.expected
    again = llm.generate(model.prompts, GREEDY)
    assert tokens_of(again) == model.expected
    assert [output.num_cached_tokens for output in again] == [len(prompt) for prompt in model.prompts]
    assert llm.engine.stats.preemptions > 4


@pytest.mark.parametrize("name", NAMES)
def test_a_state_from_a_file_goes_on_in_two_forks(case, name, tmp_path):
    model = case(name)
    state = saved_in_the_middle(model, tmp_path / "s.safetensors")
    tails = [[], model.prompts[2]]
    engine = model.llm().engine
    for index, tail in enumerate(tails):
        engine.add_request(str(index), state.tokens + tail, GREEDY, Extras(resume=state.snapshot))
    outputs = drain(engine)
    expected = generate(
        model.path, [state.tokens + tail for tail in tails], NUM_TOKENS, ignore_eos=True, dtype=model.dtype
    )
    for index in range(2):
        assert sum((new.outputs[0].token_ids for new in outputs[str(index)]), []) == expected[index]
        assert outputs[str(index)][0].num_cached_tokens == len(state.tokens) - 1


def test_a_state_of_every_model_goes_on_in_another_process(case, tmp_path):
    states, expected = [], []
    for index, name in enumerate(NAMES):
        model, file = case(name), tmp_path / f"{index}.safetensors"
        saved_in_the_middle(model, file)
        states.append((str(model.path), model.dtype, str(file)))
        expected.append(model.expected[0][5:])
    command = [sys.executable, "-c", CONTINUE]
    printed = subprocess.run(command, input=json.dumps(states), capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in printed.splitlines()] == expected


def saved_in_the_middle(model: Case, file: Path) -> StoredState:
    """The state after the first prompt and five tokens, written to a file and read from it."""
    engine = model.llm().engine
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine.add_request("r", model.prompts[0], params, Extras(snapshot=True))
    *_, last = drain(engine)["r"]
    write_state(file, StoredState(model.prompts[0] + model.expected[0][:5], last.outputs[0].snapshot), engine.identity)
    return read_state(file, engine.identity)
