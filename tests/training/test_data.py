"""Shards hold every document; a step's samples do not depend on how many ranks share them."""

import shutil
import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spikingbrain.errors import InputError
from spikingbrain.files import read_json
from spikingbrain_training import data as training_data
from spikingbrain_training.data import IGNORED, Batch, TokenDataset, build, micro_batches
from spikingbrain_training.stages import logits

from .conftest import LENGTH, LENGTHS

END = 256


def test_a_shard_holds_every_document_in_order_and_ends_each(data, texts, tokenizer):
    tokens = np.fromfile(data / "tokens.bin", "uint16")
    offsets = np.fromfile(data / "documents.bin", "int64")
    assert offsets.tolist() == [0, *np.cumsum([length + 1 for length in LENGTHS]).tolist()]
    assert read_json(data / "index.json")["num_tokens"] == len(tokens)
    # Tokens are letters, and lower case is numbered in order.
    first = PreTrainedTokenizerFast.from_pretrained(tokenizer).convert_tokens_to_ids("a") - ord("a")
    for file, start, end in zip(texts, offsets, offsets[1:], strict=False):
        assert (tokens[start : end - 1].astype(int) - first).tolist() == list(file.read_bytes())
        assert tokens[end - 1] == END


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_sees_every_sequence_once_whatever_the_world_size(data, world):
    dataset = TokenDataset(data, LENGTH, seed=3)
    steps = dataset.num_sequences // 4
    seen = [row for step in range(steps) for row in step_rows(dataset, step, world)]
    assert len(set(seen)) == len(seen) == 4 * steps
    places = [dataset.place(number) for number in range(dataset.num_sequences)]
    assert sorted(places) == list(range(dataset.num_sequences))
    assert places != [dataset.place(dataset.num_sequences + number) for number in range(dataset.num_sequences)]


def step_rows(dataset: TokenDataset, step: int, world: int) -> list[bytes]:
    batches = [batch for rank in range(world) for batch in micro_batches(dataset, step, 4, 1, rank, world)]
    return [torch.cat([*batch]).numpy().tobytes() for batch in batches]


def test_a_step_depends_on_seed_and_step_alone(data):
    one, other = TokenDataset(data, LENGTH, seed=3), TokenDataset(data, LENGTH, seed=3)
    later = step_rows(one, 5, 1)
    # The other has read nothing before, and for four ranks.
    assert step_rows(other, 5, 4) == step_rows(other, 5, 2) == later
    assert step_rows(one, 4, 1) != later
    assert step_rows(TokenDataset(data, LENGTH, seed=4), 5, 1) != later


def test_a_target_is_the_next_token_of_the_same_document(data):
    tokens = np.fromfile(data / "tokens.bin", "uint16").astype("int64")
    dataset = TokenDataset(data, LENGTH, seed=0)
    for number in range(dataset.num_sequences):
        start = dataset.place(number) * LENGTH
        batch = dataset.batch([number])
        row = tokens[start : start + LENGTH]
        assert batch.inputs[0].tolist() == row.tolist()
        following = np.where(row == END, IGNORED, tokens[start + 1 : start + LENGTH + 1])
        assert batch.labels[0].tolist() == following.tolist()
        begins = [0, *(np.flatnonzero(row[:-1] == END) + 1).tolist(), LENGTH]
        assert batch.cu_seqlens.tolist() == begins
        counted = [place for a, b in zip(begins, begins[1:], strict=False) for place in range(b - a)]
        assert batch.positions[0].tolist() == counted


@pytest.mark.parametrize("family", ["qwen2", "ours"])
def test_nothing_crosses_the_edge_of_a_document(family, data, request):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(family), dtype=torch.float32).eval()
    batch = TokenDataset(data, LENGTH, seed=3).batch([0, 1, 2, 3])
    edges = batch.cu_seqlens.tolist()
    assert len(edges) > 5
    before = logits(model, batch)
    for begin, end in zip(edges, edges[1:], strict=False):
        changed = batch.inputs.flatten().clone()
        changed[begin:end] = (changed[begin:end] + 1) % END
        after = logits(model, Batch(changed.view_as(batch.inputs), batch.labels, batch.positions))
        same = (after == before).all(-1)
        assert not same[begin:end].any()
        assert same[:begin].all()
        assert same[end:].all()


def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def test_a_damaged_file_is_named(data, tmp_path):
    shard = copy(data, tmp_path)
    content = bytearray((shard / "tokens.bin").read_bytes())
    content[7] ^= 1
    (shard / "tokens.bin").write_bytes(content)
    TokenDataset(shard, LENGTH, seed=0)
    with pytest.raises(InputError, match=r"tokens\.bin"):
        TokenDataset(shard, LENGTH, seed=0, checksums=True)
    (shard / "tokens.bin").write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"tokens\.bin"):
        TokenDataset(shard, LENGTH, seed=0)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "index.json"])
def test_a_missing_file_is_named(data, tmp_path, name):
    shard = copy(data, tmp_path)
    (shard / name).unlink()
    with pytest.raises(InputError, match=name):
        TokenDataset(shard, LENGTH, seed=0)


def test_too_little_text_for_one_sequence_is_said(data):
    with pytest.raises(InputError, match="too few for sequence_length 100000"):
        TokenDataset(data, 100_000, seed=0)


def test_a_tokenizer_without_an_end_mark_is_refused(texts, tokenizer, tmp_path):
    endless = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    endless.eos_token = None
    with pytest.raises(InputError, match="end"):
        build(texts, endless, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_build_leaves_nothing(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "FILES_AT_ONCE", 4)
    fast, calls = PreTrainedTokenizerFast.from_pretrained(tokenizer), []
    original = type(fast).__call__

    def tokenise(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(fast), "__call__", tokenise)
    with pytest.raises(KeyboardInterrupt):
        build(texts, fast, tmp_path / "out")
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []
