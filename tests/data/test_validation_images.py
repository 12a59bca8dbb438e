"""Validation images that are read in parts."""

from __future__ import annotations

from pathlib import Path

import torch

from deat_rb.data.datasets import load_data
from deat_rb.data.validation_images import ValidationImages


def test_validation_images_of_files_are_the_tensors_parts(image_folder: Path) -> None:
    files = load_data("folder", data_dir=image_folder, memory_limit=0).test
    images, labels = files.tensors()
    held = ValidationImages(files, "cpu")
    assert len(held) == 16
    assert torch.equal(held.labels, labels)
    parts = list(held.split(6))
    assert [len(part) for part in parts] == [6, 6, 4]
    assert torch.equal(torch.cat(parts), images)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    assert torch.equal(held[:5], images[:5])
    [(batch, of_batch)] = held
    assert torch.equal(batch, images)
    assert torch.equal(of_batch, labels)
