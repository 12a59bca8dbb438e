"""Options of eval, predict and export that describe a network, and imports of modules from the current folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from deat_rb.utils.errors import DeatError

from .options import GroupedOption, numbers

F = TypeVar("F", bound=Callable[..., Any])

PACKAGES = ("torchvision", "timm", "robustbench", "hf")


NETWORK = "Network, if it does not describe itself"
"""Heading of the options in ``--help``."""

described = partial(click.option, cls=GroupedOption, group=NETWORK)

NETWORK_OPTIONS = (
    described("--arch", metavar="NAME", help="Architecture of a checkpoint, as for train."),
    described("--num-classes", type=int, metavar="N", help="Number of classes (logits) of a checkpoint's network."),
    described("--image-size", type=int, metavar="N",
              help="Resize images to N x N pixels, the size used in training."),
    described("--classes", type=click.Path(path_type=Path), metavar="FILE",
              help="Class names, one per line in the order of the network's logits; labels are matched by name."),
    described("--mean", type=numbers, metavar="R,G,B",
              help="Mean of the network's normalization, for images in [0, 1], if the weights have none."),
    described("--std", type=numbers, metavar="R,G,B", help="Standard deviation of the network's normalization."),
    described("--normalize", metavar="NAME", help="Use --mean and --std of cifar10, cifar100, digits or imagenet."),
    described("--weights-key", metavar="KEY",
              help="State dict to load from a checkpoint that has several, such as state_dict_ema."),
    described("--model-dir", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder for the weights of RobustBench's model zoo.  [default: models]"),
    described("--trust-code", is_flag=True,
              help="Allow a run to call the package.module:factory that builds its network."),
)  # fmt: skip


def network_options(command: F) -> F:
    """Add `NETWORK_OPTIONS` to a command; `description` converts them to arguments of `open_target`."""
    for option in reversed(NETWORK_OPTIONS):
        command = option(command)
    return command


def description(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, normalize: str | None, **options: Any
) -> dict[str, Any]:
    """Return the options, with --mean, --std and --normalize combined into ``normalization``."""
    from deat_rb.models.normalization import parse_normalization

    if options.get("arch") is not None:
        import_from_current_folder(options["arch"])
    return {**options, "normalization": parse_normalization(mean, std, normalize)}


def import_from_current_folder(name: str) -> None:
    """Make ``module:function``, typed by the user, importable if the module lies in the current folder.

    A console script does not have the current folder on sys.path. Names read from files are not handled here: they
    require --trust-code and are resolved on the Python path only.
    """
    kind, colon, _ = name.partition(":")
    package = kind.partition(".")[0]
    if not colon or kind in PACKAGES or package in sys.modules or not package.isidentifier():
        return
    folder = Path.cwd()
    if str(folder) in sys.path or not ((folder / f"{package}.py").is_file() or (folder / package).is_dir()):
        return
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module(kind)
    except Exception as error:  # user code may raise any exception
        first = str(error).partition("\n")[0]
        raise DeatError(f"'{name}' cannot be imported from {folder} ({type(error).__name__}: {first})") from error
    finally:
        sys.path.remove(str(folder))
    sys.path.append(str(folder))  # for imports that the module makes later
