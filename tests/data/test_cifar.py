from __future__ import annotations

import hashlib
import http.client
import pickle
import ssl
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torchvision

from deat_rb.data.datasets import Dataset, load_data
from deat_rb.utils.errors import DeatError


class Server:
    """Stands in for urlopen: returns the content in pieces, then raises the failure, if there is one."""

    def __init__(self, content: bytes, failure: Exception | None = None) -> None:
        self.content, self.failure = content, failure

    def __call__(self, request: Any, *_: Any, **__: Any) -> Any:
        pieces = [self.content[start : start + 1000] for start in range(0, len(self.content), 1000)]

        def read(_: int) -> bytes:
            if pieces:
                return pieces.pop(0)
            if self.failure is not None:
                raise self.failure
            return b""

        response = SimpleNamespace(url=request.full_url, length=len(self.content), read=read)

        class Opened:
            def __enter__(self) -> Any:
                return response

            def __exit__(self, *_: object) -> None:
                return None

        return Opened()


def no_network(*_: Any, **__: Any) -> Any:
    raise urllib.error.URLError("Temporary failure in name resolution")


# A CIFAR-10 of two files with two images each, whose checksums replace those in torchvision's tables.


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    source = torchvision.datasets.CIFAR10
    made = tmp_path / "made" / source.base_folder
    made.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    contents: dict[str, Any] = {
        "data_batch_1": {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [9, 3]},
        "test_batch": {
            "data": np.arange(2 * 3072, dtype=np.uint16).astype(np.uint8).reshape(2, -1),
            "labels": [0, 1],
        },
        "batches.meta": {"label_names": [f"class{number}" for number in range(10)]},
    }
    for name, content in contents.items():
        (made / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((made / name).read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as tar:
        tar.add(made, source.base_folder)
    packed = (tmp_path / "made.tar.gz").read_bytes()
    monkeypatch.setattr(source, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(packed).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return packed


def check(data: Dataset) -> None:
    assert data.name == "cifar10"
    assert data.train.labels.tolist() == [9, 3]
    assert data.test.labels.tolist() == [0, 1]
    assert data.classes[:2] == ("class0", "class1")
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.std == (0.2471, 0.2435, 0.2616)
    # Row by row, channel after channel: value k of an image is at channel k // 1024, row k % 1024 // 32.
    assert data.test.in_memory().images.shape == (2, 3, 32, 32)
    assert data.test.in_memory().images[0, 2, 5, 7].item() == (2 * 1024 + 5 * 32 + 7) % 256
    assert data.test.in_memory().images.is_contiguous()


def test_load_data_downloads_cifar_once(tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "some" / "data"
    monkeypatch.setattr(urllib.request, "urlopen", Server(archive))
    check(load_data("cifar10", data_dir=root))
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    check(load_data("cifar10", data_dir=str(root)))


def test_load_data_downloads_cifar_to_data(tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", Server(archive))
    check(load_data("cifar10"))
    assert (tmp_path / "data" / "cifar-10-batches-py").is_dir()


def test_load_data_unpacks_an_archive_that_is_there(tmp_path: Path, archive: bytes) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(archive)
    check(load_data("cifar10", data_dir=root))
    assert (root / "cifar-10-python.tar.gz").read_bytes() == archive


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        TimeoutError("timed out"),
        ConnectionResetError("reset by peer"),
        http.client.IncompleteRead(b""),
        ssl.SSLError("certificate"),
        None,
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_load_data_removes_a_failed_download(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    root = tmp_path / "data"
    monkeypatch.setattr(urllib.request, "urlopen", Server(archive[: len(archive) // 2], failure))
    with pytest.raises(DeatError) as caught:
        load_data("cifar10", data_dir=root)
    message = str(caught.value)
    assert f"save it as {root / 'cifar-10-python.tar.gz'}" in message
    assert str(root / "cifar-10-batches-py") in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert "--dataset digits and --dataset folder need no download" in message
    assert not root.exists()


def test_load_data_without_network_keeps_other_files(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("kept")
    with pytest.raises(DeatError, match="Temporary failure in name resolution"):
        load_data("cifar10", data_dir=tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]


def test_load_data_names_the_files_of_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(DeatError, match=r"cifar100 could not be downloaded .*cifar-100-python\.tar\.gz"):
        load_data("cifar100", data_dir=tmp_path)


def test_load_data_refuses_a_damaged_archive_and_keeps_it(tmp_path: Path, archive: bytes) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(archive[:-20])
    with pytest.raises(DeatError, match=f"{path} is incomplete or damaged .* download it again"):
        load_data("cifar10", data_dir=tmp_path)
    assert path.read_bytes() == archive[:-20]
    assert not (tmp_path / "cifar-10-batches-py").exists()


def test_load_data_refuses_damaged_files(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    load_data("cifar10", data_dir=tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
    with pytest.raises(DeatError, match="cifar-10-batches-py is incomplete or damaged: remove it"):
        load_data("cifar10", data_dir=tmp_path)
