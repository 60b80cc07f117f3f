"""Memory on huge pages is memory like any other."""

import copy
import gc
import mmap

import pytest
import torch

from spikingbrain_kernels import pack
from spikingbrain_kernels.memory import HUGE, zeros

huge = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("elements", [0, 1, HUGE // 4 - 1, HUGE, 3 * HUGE + 5])
def test_it_is_zeros_of_its_own_that_can_be_written_copied_and_kept(dtype, elements):
    tensor, other = zeros([elements], dtype), zeros([elements], dtype)
    assert tensor.shape == (elements,)
    assert tensor.dtype == dtype
    assert not tensor.any()
    tensor.fill_(3)
    assert not other.any()
    copied = copy.deepcopy(tensor)
    part = tensor[elements // 2 :]
    del tensor
    gc.collect()
    assert bool((part == 3).all())
    assert bool((copied == 3).all())


@huge
def test_a_large_one_begins_on_a_huge_page_and_has_its_shape():
    tensor = zeros((3, HUGE, 2), torch.int8)
    assert tensor.shape == (3, HUGE, 2)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % HUGE == 0


@pytest.mark.parametrize("elements", [1 << 46, 1 << 70])
def test_more_than_there_is_is_the_error_that_torch_gives(elements):
    with pytest.raises((RuntimeError, TypeError)):
        zeros([elements], torch.float32)


@huge
def test_packed_weights_lie_on_huge_pages():
    packed = pack(torch.randn(2048, 1100), "int8")
    assert packed.weight.data_ptr() % HUGE == 0
    weight, scale = packed.dense()
    assert weight.shape == (2048, 1100)
    assert scale.shape == (2048, 9)
