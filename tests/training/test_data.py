"""Shards hold every document; a step's samples do not depend on how many ranks share them."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spikingbrain.errors import InputError
from spikingbrain.files import read_json
from spikingbrain_training import build as building
from spikingbrain_training import documents
from spikingbrain_training.build import build
from spikingbrain_training.data import BLOCK, IGNORED, Batch, Mixture, TokenDataset, micro_batches, open_data
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
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="end"):
        build(texts, tmp_path / "endless", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_build_goes_on_where_it_was(data, texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "TEXT_FILES_AT_ONCE", 4)
    original, done = building._tokenise, []

    def tokenise(part):
        if len(done) == 3:
            raise KeyboardInterrupt
        original(part)
        done.append(part.unit)

    monkeypatch.setattr(building, "_tokenise", tokenise)
    with pytest.raises(KeyboardInterrupt):
        build(texts, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = done.copy()
    done.clear()
    monkeypatch.setattr(building, "_tokenise", lambda part: (original(part), done.append(part.unit)))
    build(texts, tokenizer, tmp_path / "out")
    assert [*first, *done] == documents.units(texts)
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == (data / "tokens.bin").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_built_from_something_else_is_not_used(data, texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(texts[:3], tokenizer, tmp_path / "out")
    monkeypatch.undo()
    build(texts, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == (data / "tokens.bin").read_bytes()


def written(texts, folder) -> dict[str, list]:
    """The same documents in every format."""
    contents = [file.read_text() for file in texts]
    lines = folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(contents)))
    table = pyarrow.table({"text": contents})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=5)
    saved = folder / "saved"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    with pyarrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    return {"jsonl": [lines], "parquet": [folder / "rows.parquet"], "datasets": [saved]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_every_format_gives_the_same_shard(data, texts, tokenizer, tmp_path, monkeypatch, kind):
    # Lines are shared at bytes that fall anywhere.
    monkeypatch.setattr(documents, "BYTES_AT_ONCE", 100)
    files = documents.data_files(written(texts, tmp_path)[kind], "*")
    build(files, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == (data / "tokens.bin").read_bytes()
    assert (tmp_path / "out" / "documents.bin").read_bytes() == (data / "documents.bin").read_bytes()


def test_several_workers_build_the_same_shard(data, texts, tokenizer, tmp_path):
    files = written(texts, tmp_path)["parquet"]
    build(files, tokenizer, tmp_path / "out", workers=2)
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == (data / "tokens.bin").read_bytes()


def test_a_record_that_cannot_be_read_is_named(tokenizer, tmp_path):
    for line, said in {'{"body": "x"}': "no 'text'; it has body", "[1]": "no object", "{": "not JSON"}.items():
        (tmp_path / "x.jsonl").write_text(line + "\n")
        with pytest.raises(InputError, match=rf"x\.jsonl.*{said}"):
            build([tmp_path / "x.jsonl"], tokenizer, tmp_path / "out")


CHAT = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}],
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat(tokenizer, tmp_path):
    talking = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    talking.chat_template = TEMPLATE
    talking.save_pretrained(tmp_path / "talking")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHAT))
    build([tmp_path / "chat.jsonl"], tmp_path / "talking", tmp_path / "chat")
    return talking, tmp_path / "chat"


def test_only_what_the_assistant_says_counts_in_the_loss(chat):
    tokenizer, path = chat
    dataset = TokenDataset(path, 64, seed=0, packing="whole")
    assert dataset.num_sequences == 2
    said = {}
    for number in range(2):
        batch = dataset.batch([number])
        counted = batch.labels[0] != IGNORED
        said[tokenizer.decode(batch.inputs[0][:4])] = tokenizer.decode(batch.labels[0][counted])
        assert torch.equal(batch.labels[0][:-1][counted[:-1]], batch.inputs[0][1:][counted[:-1]])
    assert said == {"[use": "hello;", "[sys": "answer;<end>"}


def test_whole_documents_are_cut_only_where_they_are_longer_than_a_sequence(data):
    dataset = TokenDataset(data, 40, seed=0, packing="whole")
    offsets = np.fromfile(data / "documents.bin", "int64").tolist()
    covered = []
    for number in range(dataset.num_sequences):
        place = dataset.place(number)
        start, stop = dataset._cuts[place], dataset._cuts[place + 1]
        covered.append((int(start), int(stop)))
        inside = [edge for edge in offsets if start < edge < stop]
        assert stop in offsets or (stop - start == 40 and not inside)
        batch = dataset.batch([number])
        assert batch.inputs.shape == (1, 40)
        assert (batch.labels[0, stop - start :] == IGNORED).all()
    assert sorted(covered) == list(zip(dataset._cuts[:-1].tolist(), dataset._cuts[1:].tolist(), strict=True))


def test_a_mixture_has_its_weights_in_every_block_and_depends_on_the_number_alone(data):
    datasets = [TokenDataset(data, LENGTH, seed=3), TokenDataset(data, 40, seed=3)]
    mixture = Mixture(datasets, [3.0, 1.0], seed=5)
    places = [mixture.source(number) for number in range(2 * BLOCK)]
    for source, share in enumerate([3 * BLOCK // 4, BLOCK // 4]):
        numbers = [number for which, number in places if which == source]
        # Every sample of each dataset, in its own order, none twice.
        assert numbers == list(range(2 * share))
    again = Mixture(datasets, [3.0, 1.0], seed=5)
    assert again.source(BLOCK + 77) == places[BLOCK + 77]
    assert [source for source, _ in places[:99]] != [Mixture(datasets, [3.0, 1.0], 6).source(n)[0] for n in range(99)]


def test_a_run_on_a_mixture_reads_each_sample_from_where_the_mixture_says(make_config, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    sources = [{"path": str(data), "weight": 2}, {"path": str(other)}]
    config = make_config(data={"path": None, "sources": sources})
    samples = open_data(config.data, config.seed)
    whole = samples.batch([8, 9, 10, 11])
    shares = [micro_batches(samples, 2, 4, 1, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([batch.inputs for share in shares for batch in share]), whole.inputs)


def test_data_needs_a_path_or_sources(make_config):
    with pytest.raises(ValueError, match="either path or sources"):
        make_config(data={"sources": [{"path": "x"}]})
