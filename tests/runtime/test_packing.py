import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfqc.errors import TfqcError
from tfqc.runtime.packing import pack_int4, unpack_int4

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)


@settings(deadline=None)
@given(shapes, st.booleans(), st.randoms(use_true_random=False))
def test_round_trip(shape, signed, random):
    low, high = (-8, 7) if signed else (0, 15)
    count = torch.Size(shape).numel()
    q = torch.tensor([random.randint(low, high) for _ in range(count)], dtype=torch.int8).reshape(shape)
    packed = pack_int4(q, signed=signed)
    assert packed.dtype == torch.uint8 and packed.shape == ((count + 1) // 2,)
    back = unpack_int4(packed, shape, signed=signed)
    assert back.dtype == torch.int8 and torch.equal(back, q)


def test_every_byte_unpacks_and_packs_back():
    packed = torch.arange(256, dtype=torch.uint8)
    for signed in (True, False):
        assert torch.equal(pack_int4(unpack_int4(packed, (512,), signed=signed), signed=signed), packed)


def test_layout_is_even_element_low():
    assert pack_int4(torch.tensor([1, -1, -8], dtype=torch.int8)).tolist() == [0xF1, 0x08]
    assert pack_int4(torch.tensor([[1, 15], [8, 0]], dtype=torch.int8), signed=False).tolist() == [0xF1, 0x08]


def test_non_contiguous_input_packs_in_row_major_order():
    q = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4).t()
    assert torch.equal(unpack_int4(pack_int4(q), q.shape), q)


@pytest.mark.parametrize(("signed", "value"), [(True, 8), (True, -9), (False, 16), (False, -1)])
def test_values_out_of_range_are_refused(signed, value):
    with pytest.raises(TfqcError, match="takes values"):
        pack_int4(torch.tensor([0, value], dtype=torch.int8), signed=signed)


def test_wrong_dtypes_lengths_and_padding_are_refused():
    with pytest.raises(TfqcError, match="int8"):
        pack_int4(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(TfqcError, match="packed as uint8"):
        unpack_int4(torch.zeros(2, dtype=torch.uint8), (5,))
    with pytest.raises(TfqcError, match="packed as uint8"):
        unpack_int4(torch.zeros(2, dtype=torch.int8), (4,))
    with pytest.raises(TfqcError, match="padding"):
        unpack_int4(torch.tensor([0, 0x10], dtype=torch.uint8), (3,))
