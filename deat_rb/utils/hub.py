"""Files of models on the Hugging Face Hub, read as untrusted input and pinned to a revision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deat_rb.utils.downloads import why_failed
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import printable

PREFIX = "hf:"

MAX_TEXT = 4 * 2**20
"""Largest text file in bytes; the metrics of a thousand epochs take half a megabyte."""

MAX_WEIGHTS = 2 * 2**30
"""Largest file of weights in bytes; RobustBench's largest, a WRN-94-16 in float32, has 1.5e9."""

_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"

_FILE = r"(?:/[A-Za-z0-9][A-Za-z0-9_.+%-]*)+"

_REVISION = r"[A-Za-z0-9][A-Za-z0-9_./-]{0,199}"

_ADDRESS = re.compile(f"{PREFIX}({_REPOSITORY})({_FILE})?(?:@({_REVISION}))?", re.ASCII)

_HASH = re.compile(r"[0-9a-f]{40}")


def is_hub(target: object) -> bool:
    """Return whether a target is an address on the Hub, such as ``hf:owner/name``."""
    return str(target).startswith(PREFIX) and not Path(str(target)).exists()


@dataclass(frozen=True)
class HubAddress:
    """Address of a model on the Hub: ``hf:owner/name``, optionally with ``/file`` and ``@revision``.

    Attributes:
        repository: ``owner/name``.
        file: A file in the repository; empty for a run that `deat-rb push` uploaded.
        revision: Branch, tag or commit.
    """

    repository: str
    file: str = ""
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Parse an address.

        Raises:
            DeatError: The text is not an address.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None or ".." in text or "--" in found[1]:
            raise DeatError(f"'{printable(text, 200)}' is not a model on the Hub: give hf:owner/name, optionally "
                            "with /file or @revision")  # fmt: skip
        return cls(found[1], (found[2] or "").removeprefix("/"), found[3] or "main")

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{PREFIX}{self.repository}{file}{'' if self.revision == 'main' else f'@{self.revision}'}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit's full hash."""
        return _HASH.fullmatch(self.revision) is not None


@dataclass
class HubFiles:
    """Files of one commit of a model, downloaded on demand.

    Attributes:
        address: The address with the commit's hash.
        branch: The requested revision; the cache stores which commit it was, for use when the Hub cannot be reached.
        notes: Notes for the user.
        sizes: Sizes of the commit's files in bytes by name; None if the Hub cannot be reached.
    """

    address: HubAddress
    branch: str
    notes: tuple[str, ...] = ()
    sizes: dict[str, int] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, address: HubAddress, main_file: str) -> HubFiles:
        """Find the commit of an address on the Hub, or in the local cache if the Hub cannot be reached.

        Args:
            address: The address.
            main_file: A file of the model, by which its commit is found in the cache.

        Raises:
            DeatError: The model or revision does not exist, is private or gated, or is not in the cache.
        """
        import huggingface_hub as hub

        try:
            with refusals(address):
                info: Any = hub.HfApi().model_info(
                    address.repository, revision=address.revision, files_metadata=True, timeout=20
                )
            revision = str(info.sha)
            sizes = {str(each.rfilename): int(each.size or 0) for each in info.siblings or ()}
        except DeatError:
            raise
        except Exception as error:  # any exception: without a connection, the HTTP library and the Hub raise many types
            return cls._from_cache(address, main_file, error)
        if _HASH.fullmatch(revision) is None:
            raise DeatError(f"the Hub returned no commit for {address}: try again later")
        return cls(HubAddress(address.repository, address.file, revision), address.revision, sizes=sizes)

    @classmethod
    def _from_cache(cls, address: HubAddress, main_file: str, error: Exception) -> HubFiles:
        import huggingface_hub as hub

        cached = hub.try_to_load_from_cache(address.repository, main_file, revision=address.revision)
        cause = f"the Hub cannot be reached ({why_failed(error)})"
        if not isinstance(cached, str):
            raise DeatError(f"{cause}, and {address} is not in its local cache: connect to the internet, or copy the "
                            "model here") from error  # fmt: skip
        folder = Path(cached).parents[main_file.count("/")]
        pinned = HubAddress(address.repository, address.file, folder.name)
        note = f"{cause}: {address} is used as last downloaded, {pinned.revision[:12]}"
        return cls(pinned, address.revision, (note,))

    def has(self, name: str) -> bool:
        """Return whether the commit has a file; if the Hub cannot be reached, whether the file is in the cache."""
        return self.sizes is None or name in self.sizes

    def fetch(self, name: str, limit: int) -> Path:
        """Return the local path of a file, after downloading it if necessary.

        Args:
            name: Name of the file in the repository.
            limit: Largest size in bytes.

        Raises:
            DeatError: The commit has no such file, it is too large, or it cannot be downloaded.
        """
        import huggingface_hub as hub
        from huggingface_hub import errors

        if self.sizes is not None and name not in self.sizes:
            raise DeatError(f"{self.address} has no file {name}{self._advice(name)}")
        self._check_size(name, (self.sizes or {}).get(name, 0), limit)
        try:
            with refusals(self.address):
                path = Path(hub.hf_hub_download(
                    self.address.repository, name, revision=self.branch, local_files_only=self.sizes is None
                ))  # fmt: skip
        except DeatError:
            raise
        except errors.EntryNotFoundError as error:
            where = "" if self.sizes is not None else " in the local cache, and the Hub cannot be reached"
            raise DeatError(f"{self.address} has no file {name}{where}{self._advice(name)}") from error
        except Exception as error:  # any exception: see `open`
            raise DeatError(f"{name} of {self.address} cannot be downloaded ({why_failed(error)}): try again "
                            "later") from error  # fmt: skip
        self._check_size(name, path.stat().st_size, limit)
        if path.parents[name.count("/")].name != self.address.revision:
            raise DeatError(f"{self.address} was changed during the download: try again")
        return path

    def _advice(self, name: str) -> str:
        if name != "config.json":
            return ""
        return (f", so it was not uploaded by deat-rb push: give a file of weights as {PREFIX}{self.address.repository}"
                "/FILE and describe its network with --arch")  # fmt: skip

    def _check_size(self, name: str, size: int, limit: int) -> None:
        if size > limit:
            raise DeatError(f"{name} of {self.address} is too large: {size:,} bytes (at most {limit:,})")


@contextmanager
def refusals(address: HubAddress) -> Iterator[None]:
    """Convert the Hub's access errors into `DeatError`; other errors propagate.

    Raises:
        DeatError: The model or revision does not exist, is private or gated.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise DeatError(f"{address} is gated: ask for access at {constants.ENDPOINT}/{address.repository}, and log in "
                        "with hf auth login") from None  # fmt: skip
    except errors.RevisionNotFoundError:
        raise DeatError(f"{PREFIX}{address.repository} has no revision '{address.revision}'") from None
    except errors.RepositoryNotFoundError:
        raise DeatError(f"the Hub has no model {address.repository}, or it is private: check the name, or log in with "
                        "hf auth login") from None  # fmt: skip
