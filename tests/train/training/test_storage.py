"""Training does not know where its structures lie: from an ADIOS2 file it ends with the same weights."""

from collections.abc import Callable
from pathlib import Path

import torch

from equipot.train.convert import to_bp
from equipot.train.store import Store


def test_from_an_adios_file_as_from_mapped_files(
    store: Path, train: Callable[..., Path], weights: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    to_bp(Store.open(store), tmp_path / "emt.bp", on_progress=lambda _: None)
    mapped = train(tmp_path / "mapped")
    other = train(tmp_path / "other", f'data.stores=["{tmp_path / "emt.bp"}"]')
    ours, theirs = weights(mapped), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "emt.bp" / "cache").is_dir()  # sizes are kept beside the data, here too
