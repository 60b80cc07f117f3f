"""The contract of every mixer, alone and in parallel, dense and spiking: one set of tests for whoever adds a file."""

import pytest
import torch
from conftest import relative_rms
from transformers import AutoModelForCausalLM

from spikingbrain import SpikingBrainForCausalLM, registry
from spikingbrain.state import StatePool, first_states

from .conftest import LAYOUTS, VOCABULARY, tiny_model

EXACT = 1e-10
LENGTH = 23


@pytest.fixture
def model(mixers, spiking) -> SpikingBrainForCausalLM:
    return tiny_model(mixers, spiking=spiking)


def tokens(rows=2, length=LENGTH):
    return torch.randint(0, VOCABULARY, (rows, length))


@torch.no_grad()
def in_chunks(model, ids, sizes, **options):
    cache, logits, start = None, [], 0
    for size in sizes:
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True, **options)
        cache, start = out.past_key_values, start + size
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [9, 1, 1, 12], [20, 3], [1, 22]], ids=str)
def test_any_chunking_equals_the_whole(model, sizes):
    ids = tokens()
    whole, whole_cache = in_chunks(model, ids, [LENGTH])
    chunks, cache = in_chunks(model, ids, sizes)
    assert relative_rms(chunks, whole) < EXACT
    assert relative_rms(whole, model(input_ids=ids, use_cache=False).logits) < EXACT
    for one, other in zip(cache.states, whole_cache.states, strict=True):
        assert all(relative_rms(one[name], other[name]) < EXACT for name in one)


@torch.no_grad()
def test_left_padding_changes_nothing(model):
    ids = tokens(3)
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [5], [22]])
    padded = model(input_ids=ids, attention_mask=mask.long()).logits
    for row, skipped in enumerate((0, 5, 22)):
        alone = model(input_ids=ids[row : row + 1, skipped:]).logits
        assert relative_rms(padded[row : row + 1, skipped:], alone) < EXACT


@torch.no_grad()
def test_a_ragged_batch_goes_on_as_each_row_alone(model):
    first, second = tokens(2, 12), tokens(2, 6)
    masks = [torch.arange(12) >= torch.tensor([[0], [7]]), torch.arange(6) >= torch.tensor([[2], [0]])]
    cache = model(input_ids=first, attention_mask=masks[0].long(), use_cache=True).past_key_values
    both = torch.cat(masks, 1).long()
    logits = model(input_ids=second, attention_mask=both, past_key_values=cache, use_cache=True).logits
    for row in range(2):
        ids = torch.cat([first[row, masks[0][row]], second[row, masks[1][row]]])[None]
        alone = model(input_ids=ids, use_cache=False).logits[:, -int(masks[1][row].sum()) :]
        assert relative_rms(logits[row : row + 1, masks[1][row]], alone) < EXACT


@torch.no_grad()
def test_a_later_token_changes_no_bit_before_it(model):
    ids = tokens()
    other = ids.clone()
    other[:, 15] = (other[:, 15] + 1) % VOCABULARY
    one, two = (model(input_ids=x, use_cache=False).logits for x in (ids, other))
    assert torch.equal(one[:, :15], two[:, :15])
    assert not torch.equal(one[:, 15:], two[:, 15:])


CU_SEQLENS = torch.tensor([0, 3, 15, 16, 40], dtype=torch.int32)


@torch.no_grad()
def test_packed_documents_equal_separate_ones_and_do_not_touch_each_other(model):
    ids = tokens(1, 40)
    packed = model(input_ids=ids, cu_seqlens=CU_SEQLENS).logits
    for start, end in zip(CU_SEQLENS, CU_SEQLENS[1:], strict=False):
        assert relative_rms(packed[:, start:end], model(input_ids=ids[:, start:end]).logits) < EXACT
    other = ids.clone()
    other[:, 3:15] = (other[:, 3:15] + 1) % VOCABULARY
    changed = model(input_ids=other, cu_seqlens=CU_SEQLENS).logits
    assert torch.equal(packed[:, :3], changed[:, :3])
    assert torch.equal(packed[:, 15:], changed[:, 15:])


@torch.no_grad()
def test_the_pool_gives_the_same_tokens_and_the_same_states_in_any_slot(model):
    ids = tokens(3, 11)
    pool = StatePool(model.state_specs(), num_slots=5, device="cpu", capacity=16)
    slots = torch.tensor([pool.allocate() for _ in range(4)][1:])
    positions = torch.arange(11).expand(3, -1)
    plain, states = model.step(ids, first_states(model.state_specs(), 3, "cpu"), positions=positions)
    pooled = [model.step(ids[:, :7], pool.states(slots), positions=positions[:, :7])[0]]
    pooled += [
        model.step(ids[:, t : t + 1], pool.states(slots), positions=positions[:, t : t + 1])[0] for t in range(7, 11)
    ]
    assert relative_rms(torch.cat(pooled, 1), plain) < EXACT
    for layer, expected in zip(pool.states(slots), states, strict=True):
        for name, rows in layer.items():
            assert relative_rms(rows.read()[:, : expected[name].shape[1]], expected[name]) < EXACT


@torch.no_grad()
def test_a_freed_slot_starts_from_nothing(model):
    pool = StatePool(model.state_specs(), num_slots=1, device="cpu", capacity=16)
    ids, positions = tokens(1, 9), torch.arange(9)[None]
    runs = []
    for _ in range(2):
        slot = pool.allocate()
        runs.append(model.step(ids, pool.states(torch.tensor([slot])), positions=positions)[0])
        pool.free(slot)
    assert torch.equal(*runs)


@torch.no_grad()
def test_state_bytes_grow_only_where_the_mixer_says_so(mixers):
    model = tiny_model(mixers, dtype=torch.float32)
    sizes = []
    cache = None
    for length in (8, 16, 32):
        cache = model(input_ids=tokens(1, length), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.nbytes)
    assert model.is_constant_memory == ("softmax" not in mixers[0].split("+"))
    assert (len(set(sizes)) == 1) == model.is_constant_memory


def is_smooth(layout) -> bool:
    """Whether the layout rounds nothing: the gradient of what fires is another function's than its own."""
    modules = tiny_model([layout]).modules()
    return not any(
        getattr(m, "uses_surrogates", False) or type(m).__module__.startswith("spikingbrain.neurons.") for m in modules
    )


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if is_smooth(layout)])
def test_gradients_are_those_of_the_function(layout):
    model = tiny_model([layout], num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    ids = tokens(1, 5)
    embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
    # Random directions instead of every one: a wrong derivative changes nearly all of them.
    assert torch.autograd.gradcheck(
        lambda x: model(inputs_embeds=x, use_cache=False).logits, embeddings, atol=1e-6, fast_mode=True
    )


def test_every_parameter_gets_a_gradient(model):
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_saved_and_loaded_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours.pop(name)) for name, tensor in loaded.state_dict().items())
    assert not ours
    ids = tokens()
    assert relative_rms(loaded(input_ids=ids).logits, model(input_ids=ids).logits) < EXACT


def test_gradient_checkpointing_changes_no_gradient(mixers):
    model, ids = tiny_model(mixers).train(), tokens()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(relative_rms(a, b) < EXACT for a, b in zip(*gradients, strict=True))


def test_layouts_cover_every_mixer_of_the_folder():

    assert set(registry.names("mixers")) <= set(LAYOUTS)
