"""The files that a rank writes are safetensors, are as they were hashed, and are read in parts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equipot.train.tensor_stream import Entry, TensorFile, write_stream


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return {
        "odd": torch.randn(7, generator=random),
        "nothing": torch.empty(0),
        "large": torch.randn(5_000_001, generator=random),  # more than a chunk
        "bytes": torch.randint(0, 256, (13,), dtype=torch.uint8, generator=random),
    }


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    entries = [Entry(key, tensor.dtype, tensor.numel()) for key, tensor in tensors.items()]
    return write_stream(path, entries, tensors.values(), {"word": "ü"})


def test_it_is_safetensors_and_its_checksum_is_right(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "file"
    found = write(path, tensors)
    content = path.read_bytes()
    assert found == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("by_library", [False, True])
def test_parts_are_read(tmp_path: Path, tensors: dict[str, torch.Tensor], by_library: bool) -> None:
    path = tmp_path / "file"
    if by_library:
        save_file(tensors, path, metadata={"word": "ü"})
    else:
        write(path, tensors)
    with TensorFile(path) as file:
        assert file.metadata == {"word": "ü"}
        assert "odd" in file
        assert "even" not in file
        for key, tensor in tensors.items():
            assert torch.equal(file.read(key), tensor)
        assert torch.equal(file.read("large", 4_194_300, 4_194_310), tensors["large"][4_194_300:4_194_310])


def test_what_is_no_such_file_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "file"
    write(path, tensors)
    content = path.read_bytes()
    for damaged in (b"", content[:5], content[:40], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            TensorFile(path)
    path.write_bytes(content[:-5])
    with TensorFile(path) as file, pytest.raises(ValueError, match="ends too early"):
        file.read("bytes")  # the last


def test_what_comes_must_be_what_was_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as 2 numbers"):
        write_stream(tmp_path / "file", [Entry("a", torch.float32, 3)], [torch.zeros(2)], {})
