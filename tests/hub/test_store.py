"""Packed experts in files: where they lie, and that they come back as they were."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moeforge.compress.rounding import to_format
from moeforge.errors import UserError
from moeforge.hub.store import LARGE, LINE, PAGE, Format, from_record, packed_bytes, record, to_record, write_file
from moeforge.kernels.native.coded import ZEROS, CodedWeight, coded, encode
from moeforge.models import ModelConfig

FORMATS = (
    Format(8, 128),
    Format(4, 32),
    Format(3, 64),
    Format(2, 128),
    Format("vector", 64),
    Format("ternary", 128),
    Format("coded", None),
    Format(16, None),
)


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, CodedWeight) and isinstance(other, CodedWeight):
        return torch.equal(one.dequantise(), other.dequantise()) and torch.equal(one.words, other.words)
    return torch.equal(one.packed, other.packed) and torch.equal(one.scales, other.scales)  # type: ignore[attr-defined]


def test_coded_experts_that_fit_no_record_or_end_outside_of_it_are_refused() -> None:
    shapes, format = ((48, 256), (256, 24)), Format("coded", None)
    dense = [encode(torch.randn(1, *shape).sign()) for shape in shapes]
    with pytest.raises(UserError, match=r"not for 0\.34"):
        to_record(format, dense)
    with pytest.raises(UserError, match="bytes of words"):
        to_record(
            format, [coded(torch.ones(1, *s, dtype=torch.int8), torch.ones(1, s[0]).half(), ZEROS) for s in shapes]
        )
    raw, (_, ends, *_) = (
        to_record(format, [to_format(torch.randn(1, *s), format) for s in shapes]),
        record(format, shapes)[0],
    )
    for value in (10**6, -1):
        raw[:, ends.start : ends.end].view(torch.int32)[0, 5] = value
        with pytest.raises(ValueError, match="outside of their words"):
            from_record(format, raw, shapes)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("shapes", [((48, 40), (40, 24)), ((512, 256), (256, 256))], ids=["small", "large"])
def test_a_record_gives_back_its_experts(format: Format, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    parts = [to_format(torch.randn(3, *shape), format) for shape in shapes]
    raw = to_record(format, parts)
    sections, size = record(format, shapes)
    assert raw.shape == (3, size) and size % (PAGE if size >= LARGE else LINE) == 0
    assert all(section.start % LINE == 0 for section in sections)
    assert all(same(one, other) for one, other in zip(from_record(format, raw, shapes), parts, strict=True))
    if format.bits != 16:
        held = from_record(format, raw, shapes)[0]
        assert (held.words if format.bits == "coded" else held.packed).untyped_storage().data_ptr() == raw.data_ptr()
    with pytest.raises(ValueError, match="bytes"):
        from_record(format, raw[:, :-1], shapes)


def test_a_file_starts_its_experts_at_pages_and_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a.norm": torch.randn(3),
        "b.packed.4x32": torch.randint(255, (2, PAGE + LINE), dtype=torch.uint8),
        "b.packed.8x128": torch.randint(255, (3, 17 * PAGE), dtype=torch.uint8),
        "c.weight": torch.randn(3, 5).bfloat16(),
    }
    write_file(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    experts = tensors["b.packed.8x128"].numpy().tobytes()
    assert begin % PAGE == 0 and data[begin : begin + len(experts)] == experts
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_a_record_that_experts_share_is_there_once_and_read_by_each() -> None:
    moe = {"experts": {"num_experts": 4, "d_expert": 24}}
    config = ModelConfig.model_validate(
        {"vocab_size": 9, "d_model": 16, "num_layers": 2, "num_heads": 2, "first_dense_layers": 1, "moe": moe}
    )
    shapes = (48, 16), (16, 24)
    four, eight = (record(Format(bits, 32), shapes)[1] for bits in (4, 8))
    parts = [{"bits": 4, "group": 32, "rows": [[0, 1, 3]]}, {"bits": 8, "group": 32, "rows": [[2]]}]
    found = [*packed_bytes(config, {"blocks.1.moe.banks.0": parts})]
    assert found == [(1, 4 * (48 * 16 + 16 * 24), four + eight, 3 * four + eight)]
