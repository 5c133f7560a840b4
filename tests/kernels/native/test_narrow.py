"""Weights of 3 bits, 2 bits and three values: bytes as the module says, and the same numbers back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.kernels.native.narrow import BYTES, LEVELS, Narrow, NarrowWeight, pack, unpack
from moeforge.kernels.native.quantised import ORDER

KINDS: list[Narrow] = [3, 2, "ternary"]


def drawn(bits: Narrow, seed: int, *shape: int) -> torch.Tensor:
    low, step, count = LEVELS[bits]
    levels = torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))
    return (low + step * levels).to(torch.int8)


@given(bits=st.sampled_from(KINDS), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_codes_come_back(bits: Narrow, blocks: int, seed: int) -> None:
    codes = drawn(bits, seed, 2, 3, 128 * blocks)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, BYTES[bits] * blocks)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", KINDS)
def test_every_byte_is_as_the_module_says(bits: Narrow) -> None:
    low, step, _ = LEVELS[bits]
    codes = drawn(bits, 1, 128)
    level = [(code - low) // step for code in codes[ORDER].tolist()]
    if bits == "ternary":
        level += [0, 0]
        wanted = [sum(3**k * level[i + 26 * k] for k in range(5)) for i in range(26)]
    else:
        wanted = [sum((level[i + 32 * k] & 3) << 2 * k for k in range(4)) for i in range(32)]
    if bits == 3:
        wanted += [sum((level[i + 16 * b] >> 2) << b for b in range(8)) for i in range(16)]
    assert pack(codes, bits).tolist() == wanted


@pytest.mark.parametrize("bits", KINDS)
def test_the_experts_named_are_widened_to_the_same_numbers(bits: Narrow) -> None:
    codes, scales = drawn(bits, 2, 3, 5, 256), torch.rand(3, 5, 4).half()
    weight = NarrowWeight(pack(codes, bits), scales, bits, 64, (3, 5, 200))
    wanted = (codes.float().unflatten(-1, (4, 64)) * scales.float()[..., None]).flatten(-2)[..., :200]
    wide = weight.widen([2, 0])
    assert wide.bits == 4 and wide.shape == (2, 5, 200)
    assert torch.equal(wide.dequantise(), wanted[[2, 0]])
    assert torch.equal(weight.dequantise(), wanted)
    assert weight.nbytes == 3 * 5 * (2 * BYTES[bits] + 2 * 4)
