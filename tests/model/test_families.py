"""What every family promises: recognised by its files, one name for one tensor, nothing missing, nothing left over."""

from pathlib import Path

import pytest

from spikingbrain import InputError, registry
from spikingbrain.families import expected_tensors, our_name, recognise, their_name

from .test_interchange import release

GOLDEN = Path(__file__).parent.parent / "golden"
RELEASES = {
    "gla_swa": GOLDEN / "spikingbrain1",
    "metala": GOLDEN / "metala",
    "spikegpt": GOLDEN / "spikegpt" / "model.pth",
}


@pytest.fixture
def path(name, tmp_path):
    """What the family's authors released, in small; W8ASpike is made here."""
    if name == "w8aspike":
        release(tmp_path / name)
    return RELEASES.get(name, tmp_path / name)


@pytest.mark.parametrize("name", registry.names("families"))
def test_a_release_is_recognised(name, path):
    assert recognise(path) is registry.load("families", name)


# W8ASpike's modules become int8 while it is loaded; the tests of imports compare its tensors.
@pytest.mark.parametrize("name", RELEASES)
def test_a_release_has_exactly_the_tensors_that_are_expected(name, path):
    family = registry.load("families", name)
    config, tensors = family.read(path)
    assert {tensor: tensors.get(tensor).shape for tensor in tensors} == expected_tensors(family, config)


@pytest.mark.parametrize("name", registry.names("families"))
def test_names_go_both_ways(name, path):
    family = registry.load("families", name)
    _, tensors = family.read(path)
    assert all(their_name(family.NAMES, our_name(family.NAMES, tensor)) == tensor for tensor in tensors)


def test_a_path_of_no_family_is_an_error_that_names_the_families(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "nothing"):
        with pytest.raises(InputError, match=", ".join(registry.names("families"))):
            recognise(path)
