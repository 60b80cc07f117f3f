"""generate() for every released family, imported: cached, padded, in beams, continued, never rolled back."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain import registry
from spikingbrain.interchange import import_release

from .test_interchange import RELEASES, release

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=registry.names("families"))
def model(request, tmp_path):
    torch.manual_seed(4)
    if request.param == "w8aspike":
        release(source := tmp_path / "release", outliers=0.01)
    else:
        source = RELEASES[request.param]
    assert import_release(source, tmp_path / "model") == request.param
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()


def test_generate_with_and_without_a_cache_padded_in_beams_and_continued(model):
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for options in ({}, {"num_beams": 3}):
        cached = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY, **options)
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **GREEDY, **options)
        assert torch.equal(cached, plain)
    alone = model.generate(ids[1:, 4:], max_new_tokens=8, **GREEDY)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(batch.sequences[1, 9:], alone[0, 5:])
    longer = torch.cat([batch.sequences, ids[:, :3]], 1)
    longer_mask = torch.cat([mask, torch.ones(2, 11, dtype=torch.long)], 1)
    options = {"attention_mask": longer_mask, "max_new_tokens": 5, **GREEDY}
    goes_on = model.generate(longer, past_key_values=batch.past_key_values, **options)
    assert torch.equal(goes_on, model.generate(longer, **options))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=model, max_new_tokens=2, **GREEDY)
