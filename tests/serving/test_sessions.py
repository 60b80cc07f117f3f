"""Saved states: refused unless whole and of this model; complete or absent whatever happens while they are written."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spikingbrain.errors import InputError
from spikingbrain_serving import LLM, Extras, InvalidRequest, SamplingParams
from spikingbrain_serving.sessions import SessionStore
from spikingbrain_serving.state_file import StoredState, read_metadata, read_state, write_state

from .conftest import save_model
from .test_engine import drain

SAVE_FOR_EVER = """
import pathlib, sys
from spikingbrain_serving import LLM
from spikingbrain_serving.state_file import read_state, write_state
llm, path = LLM(sys.argv[1]), pathlib.Path(sys.argv[2])
state = read_state(path, llm.engine.identity)
sys.stdout.write("ready\\n")
sys.stdout.flush()
while True:
    write_state(path, state, llm.engine.identity)
"""


def stored(llm, tokens) -> StoredState:
    llm.engine.add_request("s", tokens, SamplingParams(), Extras(prefill_only=True, snapshot=True))
    (output,) = drain(llm.engine)["s"]
    return StoredState(tokens, output.outputs[0].snapshot, {"why": "a test"})


@pytest.fixture(scope="module")
def llm(model_dir):
    return LLM(model_dir)


@pytest.fixture
def state(llm, prompt_tokens):
    return stored(llm, prompt_tokens[0])


@pytest.fixture
def store(llm, tmp_path):
    return SessionStore(tmp_path / "sessions", llm.engine.identity, 10**9)


def test_what_is_read_is_what_was_written(llm, state, tmp_path):
    path = tmp_path / "s.safetensors"
    write_state(path, state, llm.engine.identity)
    again = read_state(path, llm.engine.identity)
    assert (again.tokens, again.notes, again.snapshot.num_tokens) == (state.tokens, state.notes, len(state.tokens))
    for before, after in zip(state.snapshot.states, again.snapshot.states, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state.snapshot.hidden, again.snapshot.hidden)
    copy = tmp_path / "copy.safetensors"
    write_state(copy, again, llm.engine.identity)
    # The order of a header's entries is not ours to choose; everything else is the same.
    assert read_metadata(copy) == read_metadata(path)
    assert sorted(copy.read_bytes()) == sorted(path.read_bytes())


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.999])
def test_a_damaged_state_is_refused(llm, state, tmp_path, place):
    path = tmp_path / "s.safetensors"
    write_state(path, state, llm.engine.identity)
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_state(path, llm.engine.identity)
    path.write_bytes(content[: int(len(content) * place)])
    with pytest.raises(InputError, match="damaged"):
        read_state(path, llm.engine.identity)


def test_the_state_of_another_model_is_refused(llm, state, tmp_path, tokenizer, model_dir):
    path = tmp_path / "s.safetensors"
    write_state(path, state, llm.engine.identity)
    spiking = LLM(save_model(tmp_path / "spiking", tokenizer, spiking={"neuron": "adaptive"}))
    other_packing = LLM(model_dir, pack="none")
    touched = LLM(model_dir)
    with torch.no_grad():
        touched.engine.model.model.embed_tokens.weight[5, 3] += 1e-3
    for other in (spiking, touched, other_packing):
        with pytest.raises(InputError, match="of another model"):
            read_state(path, other.engine.identity)
    assert read_state(path, LLM(model_dir).engine.identity).tokens == state.tokens


def test_a_growing_state_is_saved_too(softmax_model_dir, prompt_tokens, tmp_path):
    llm = LLM(softmax_model_dir, max_num_seqs=2)
    short = stored(llm, prompt_tokens[1])
    state = stored(llm, prompt_tokens[0])
    path = tmp_path / "s.safetensors"
    write_state(path, state, llm.engine.identity)
    assert state.snapshot.nbytes > short.snapshot.nbytes
    again = read_state(path, llm.engine.identity)
    expected = llm.generate(prompt_tokens[0], SamplingParams(temperature=0))[0].outputs[0].token_ids
    llm.engine.add_request("r", again.tokens, SamplingParams(temperature=0), Extras(resume=again.snapshot))
    assert sum((new.outputs[0].token_ids for new in drain(llm.engine)["r"]), []) == expected


def test_killing_the_process_while_it_saves_leaves_the_old_state_whole(llm, state, tmp_path, model_dir):
    path = tmp_path / "s.safetensors"
    write_state(path, state, llm.engine.identity)
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(model_dir), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert read_state(path, llm.engine.identity).tokens == state.tokens


@pytest.mark.parametrize("share", [0.01, 0.6])
def test_a_full_disk_is_said_and_leaves_the_old_state_whole(store, state, share):
    size = store.save("s", state).bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file that may not grow fails where a full disk does, in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), hard))
    try:
        with pytest.raises(InvalidRequest, match="disk is full"):
            store.save("s", StoredState([1], state.snapshot))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.load("s").tokens == state.tokens
    assert [file.name for file in store._directory.iterdir()] == ["s.safetensors"]


def test_what_a_killed_process_left_half_written_is_removed_in_time(store, state):
    store.save("s", state)
    old, new = (store._directory / f".s.safetensors.partial-{name}" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    SessionStore(store._directory, store._identity, 10**9)
    assert {file.name for file in store._directory.iterdir()} == {"s.safetensors", new.name}


def test_sessions_are_listed_forked_and_deleted(store, state):
    store.save("first", state)
    fork = store.fork("first", "second")
    assert (fork.parent, fork.num_tokens) == ("first", len(state.tokens))
    assert {info.id for info in store.all()} == {"first", "second"}
    store.delete("first")
    assert [info.id for info in store.all()] == ["second"]
    assert store.load("second").tokens == state.tokens
    with pytest.raises(InvalidRequest, match="no session 'first'"):
        store.load("first")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\x00b", "a\n", ".hidden", "x" * 101])
def test_a_name_that_could_lead_elsewhere_is_refused(store, state, name):
    for use in (lambda: store.save(name, state), lambda: store.load(name), lambda: store.delete(name)):
        with pytest.raises(InvalidRequest, match="a session's id is"):
            use()


def test_responses_nobody_named_make_room_and_named_sessions_do_not(llm, state, tmp_path: Path):
    probe = SessionStore(tmp_path / "probe", llm.engine.identity, 10**9).save("x", state).bytes
    store = SessionStore(tmp_path / "s", llm.engine.identity, 3 * probe)
    for name in ("resp_1", "named", "resp_2", "resp_3"):
        store.save(name, state)
        time.sleep(0.01)
    assert {info.id for info in store.all()} == {"named", "resp_2", "resp_3"}
    store.save("other", state)
    store.save("third", state)
    with pytest.raises(InvalidRequest, match="would take more than"):
        store.save("resp_4", state)
