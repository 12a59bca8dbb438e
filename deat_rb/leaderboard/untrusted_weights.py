"""Weights that strangers hand in: looked through before anything loads them, and held against the network after."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from deat_rb.leaderboard.untrusted import read_limited
from deat_rb.models.spec import ModelSpec, NormalizedModel
from deat_rb.models.weights import check_weights
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import load_tensors, opcodes
from deat_rb.utils.text import printable

MAX_WEIGHTS = 2 * 2**30
"""Bytes of a file of weights; RobustBench's largest, a WRN-94-16 in float32, has 1.5e9."""

MAX_PICKLE = 16 * 2**20

MAX_HEADER = 4 * 2**20
"""Bytes of a safetensors file's header, which takes some 150 for a tensor."""

MAX_TENSORS = 20_000

RESAVE = "save it anew by torch.save(model.state_dict(), path) or as safetensors"

_MEMBER = re.compile(
    r"[A-Za-z0-9_.-]{1,200}/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
    r"|data/\d{1,9})",
    re.ASCII,
)

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")

_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
"""All that a state dict's pickle has to name. torch's own list is longer, and lets a kilobyte ask for gigabytes."""

_CALLS_BY_OTHER_NAMES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


def copy_untrusted_weights(source: Path, target: Path, *, limit: int = MAX_WEIGHTS) -> None:
    """Copies a stranger's weights to ``target``, of which every byte has been looked at.

    A file of `torch.save` is packed anew from the members that were looked at, so that whatever reads the copy finds
    those and no others.

    Args:
        source: The file.
        target: In a folder of one's own.
        limit: Bytes.

    Raises:
        DeatError: It is too large, a link, packed to grow, names anything but tensors, or holds such as say that they
            are larger than the file.
    """
    data = read_limited(source, limit)
    if source.suffix != ".safetensors" and data[8:9] != b"{":
        data = _packed_anew(data, source)
    elif int.from_bytes(data[:8], "little") > MAX_HEADER and len(data) > MAX_HEADER:
        raise DeatError(f"{source} has a safetensors header of more than {MAX_HEADER} bytes, too large for names")
    target.write_bytes(data)
    try:
        tensors = load_tensors(target)
    except DeatError as error:  # which speaks of the copy
        raise DeatError(str(error).replace(str(target), str(source))) from None
    check_tensor_sizes(tensors, len(data), source)


def _packed_anew(data: bytes, source: Path) -> bytes:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise DeatError(f"{source} is a web page, probably a failed download: fetch the checkpoint again")
    if not data.startswith(b"PK\3\4"):
        raise DeatError(f"{source} is no checkpoint that a board reads: {RESAVE}")
    packed = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(packed, "w") as anew:
            members = archive.infolist()
            _check_members(members, len(data), source)
            for member in members:
                content = archive.read(member)
                if member.filename.endswith("/data.pkl"):
                    _check_pickle(content, source)
                anew.writestr(member.filename, content)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        # zipfile's of damage, of a method that it does not know (NotImplementedError) and of encryption (RuntimeError)
        if isinstance(error, DeatError):
            raise
        raise DeatError(f"{source} is a damaged archive ({printable(str(error), 100)}): {RESAVE}") from None
    return packed.getvalue()


def _check_members(members: list[zipfile.ZipInfo], size: int, source: Path) -> None:
    if len(members) > MAX_TENSORS:
        raise DeatError(f"{source} has {len(members)} members, and {MAX_TENSORS} are allowed: {RESAVE}")
    names = [member.filename for member in members]
    for name in names:
        if _MEMBER.fullmatch(name) is None or ".." in name:
            raise DeatError(f"{source} has a member '{printable(name, 80)}', which torch.save does not write: {RESAVE}")
    if len({name.casefold() for name in names}) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise DeatError(f"{source} has members of one name, or of several folders: {RESAVE}")
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        raise DeatError(f"{source} has no data.pkl: {RESAVE}")
    unpacked = sum(member.file_size for member in members)
    stored = all(member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
                 for member in members)  # fmt: skip
    if not stored or unpacked > size:
        raise DeatError(f"{source} would grow from {size} to {unpacked} bytes, and torch.save does not compress: "
                        f"{RESAVE}")  # fmt: skip


def _check_pickle(content: bytes, source: Path) -> None:
    if len(content) > MAX_PICKLE:
        raise DeatError(f"{source} has a data.pkl of {len(content)} bytes, too large for names of tensors: {RESAVE}")
    for opcode, argument in opcodes(content, source):
        if opcode in _CALLS_BY_OTHER_NAMES or (opcode == "GLOBAL" and argument not in _NAMES):
            named = printable(str(argument or opcode).replace(" ", "."), 80)
            raise DeatError(f"{source} is a pickle that asks for {named}, which is no tensor, and was not loaded: "
                            f"{RESAVE}")  # fmt: skip


def load_checked(path: Path, spec: ModelSpec, *, source: Path) -> NormalizedModel:
    """Builds a network, in eval mode, with weights that `copy_untrusted_weights` has copied; they fit it strictly.

    Args:
        path: The copy.
        spec: What the network is said to be.
        source: Where the copy comes from, for messages.

    Raises:
        DeatError: Names, shapes or types are others than the network's, or a value is not finite.
    """
    tensors = load_tensors(path)
    with seeding.preserved():
        model = spec.build()
    state = check_weights(model, tensors, source=str(source))
    check_types(model, state, source)
    said = torch.stack((model.mu, model.sigma))
    model.load_state_dict(state)
    has = torch.stack((model.mu, model.sigma))
    if not torch.allclose(said, has, atol=1e-5):
        raise DeatError(f"{source} has the normalisation {_plainly(has)}, and is said to have {_plainly(said)}: these "
                        "are other weights")  # fmt: skip
    return model.eval()


def _plainly(numbers: Tensor) -> str:
    return f"({', '.join(f'{number:.4g}' for number in numbers.flatten().tolist())})"


def check_tensor_sizes(tensors: Mapping[str, Tensor], size: int, source: Path) -> None:
    """Refuses tensors that say they are larger than the file, are not laid out plainly, or have odd names.

    Raises:
        DeatError: One is or has.
    """
    if len(tensors) > MAX_TENSORS:
        raise DeatError(f"{source} has {len(tensors)} tensors, and {MAX_TENSORS} are allowed")
    for name, tensor in tensors.items():
        if re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name, re.ASCII) is None:
            raise DeatError(f"{source} has a tensor of the name '{printable(name, 80)}', which no network has")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise DeatError(f"{source} has the tensor {name} in another layout than a network's ({tensor.layout})")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > size:
        raise DeatError(f"{source} has {size} bytes, and its tensors say that they take {total}: {RESAVE}")


def check_types(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuses weights of another type than the network's, and such as are not finite.

    Raises:
        DeatError: One is.
    """
    for name, own in model.state_dict().items():
        given = tensors[name]
        if given.dtype != own.dtype:
            raise DeatError(f"{source} has the tensor {name} as {given.dtype} where the network has {own.dtype}: "
                            "convert the weights before they are saved")  # fmt: skip
        if given.is_floating_point() and given.device.type != "meta" and not bool(given.isfinite().all()):
            raise DeatError(f"{source} has NaN or infinity in the tensor {name}: a network that has diverged cannot "
                            "be ranked")  # fmt: skip


def as_safetensors(model: nn.Module) -> bytes:
    """The network's state dict as a safetensors file: the same bytes for the same values."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    data: bytes = safetensors.torch.save(dict(sorted(state.items())))
    return data
