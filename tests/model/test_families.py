"""What every family promises: recognised by its files, one name for one tensor, nothing missing, nothing left over."""

from pathlib import Path

import pytest

from spikingbrain import InputError, registry
from spikingbrain.families import expected_tensors, our_name, recognise, their_name

GOLDEN = Path(__file__).parent.parent / "golden"
RELEASES = {
    "gla_swa": GOLDEN / "spikingbrain1",
    "metala": GOLDEN / "metala",
    "spikegpt": GOLDEN / "spikegpt" / "model.pth",
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_recognised_and_has_exactly_the_tensors_that_are_expected(name):
    family = recognise(RELEASES[name])
    assert family is registry.load("families", name)
    config, tensors = family.read(RELEASES[name])
    assert {tensor: tensors.get(tensor).shape for tensor in tensors} == expected_tensors(family, config)


@pytest.mark.parametrize("name", RELEASES)
def test_names_go_both_ways(name):
    family = registry.load("families", name)
    _, tensors = family.read(RELEASES[name])
    assert all(their_name(family.NAMES, our_name(family.NAMES, tensor)) == tensor for tensor in tensors)


def test_a_path_of_no_family_is_an_error_that_names_the_families(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "nothing"):
        with pytest.raises(InputError, match="choose from gla_swa, metala, spikegpt"):
            recognise(path)


def test_every_family_has_a_release_to_test():
    assert set(RELEASES) == set(registry.names("families"))
