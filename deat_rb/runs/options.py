"""Options of `deat-rb train`; flags, the recorded configuration and documentation are derived from the fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from deat_rb.data.augmentations import AUGMENTATIONS
from deat_rb.runs.defaults import DATASET_DEFAULTS, DEFAULT_TEXTS, SETTINGS
from deat_rb.training.options import OptimConfig, RuntimeConfig
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json
from deat_rb.utils.options import Fraction, Numbers, Option, OptionGroup, Size, option, validate


class DataConfig(OptionGroup):
    """Data."""

    dataset: str = option("digits", "Dataset; use folder for your own images.", choices=DATASET_DEFAULTS)
    data_dir: str | None = option(
        None, "Folder of CIFAR's files, or of your images in train/<class>/ and test/<class>/.",
        metavar="PATH", may_change=True,
    )  # fmt: skip
    image_size: int | None = option(None, "Resize a folder's images to N x N pixels.", default_text="32", ge=1)
    train_size: int | None = option(
        None, "Use only this many training images, stratified by class.", default_text="all", ge=1
    )
    val_size: int | None = option(
        None, "Number of training images held out for validation; of the images in val, if a folder has its own.", ge=1
    )
    batch_size: int = option(128, "Images per mini-batch.", ge=2)
    extra_data: str | None = option(
        None, "Generated or pseudo-labeled images to mix into every batch: an .npz file with the arrays image and "
        "label.", metavar="PATH", may_change=True,
    )  # fmt: skip
    extra_fraction: float | None = option(
        None, "Share of --extra-data in every batch.", default_text="0.7 with --extra-data", gt=0, lt=1
    )
    augment: str | None = option(
        None, "Augmentation of the training images; all but none, flip and resized-crop begin with crop-flip. cutmix "
        "and mixup also mix labels.",
        choices=AUGMENTATIONS,
    )  # fmt: skip
    memory_limit: Size | None = option(
        None, "Decode a folder's images in worker processes if all together would take more memory than this, such as "
        "8G.", default_text="no limit", may_change=True, ge=0,
    )  # fmt: skip


class ModelConfig(OptionGroup):
    """Model."""

    arch: str = option(
        "preactresnet18", "Architecture: preactresnet18, resnet18, wrn-D-W, timm:NAME, torchvision:NAME or "
        "package.module:factory.", metavar="NAME",
    )  # fmt: skip
    init_from: str | None = option(
        None, "Initialize the weights from this checkpoint or run, or from hf:owner/name.", metavar="PATH"
    )
    new_head: bool = option(False, "Replace the last layer of that checkpoint if it has a different number of classes.")
    pretrained: bool = option(
        False, "Initialize timm:NAME or torchvision:NAME with the library's weights, normalization and image size, and "
        "a new last layer."
    )  # fmt: skip
    weights: str | None = option(
        None, "Read the pretrained weights from this file instead of downloading them.", metavar="PATH"
    )
    freeze: str | None = option(
        None, "Do not train the parameters whose names begin with a match of this regular expression, such as "
        "'conv1|layer1'; BatchNorm layers that are frozen keep their running statistics.", metavar="PATTERN",
    )  # fmt: skip
    weights_key: str | None = option(
        None,
        "State dict to load from that checkpoint if it has several, such as state_dict_ema.",
        metavar="KEY",
        default_text="state_dict, model or another usual key",
    )
    mean: Numbers | None = option(
        None, "Mean per channel of the network's normalization, for images in [0, 1], such as 0.485,0.456,0.406.",
        default_text="the dataset's",
    )  # fmt: skip
    std: Numbers | None = option(
        None, "Standard deviation per channel of the network's normalization.", default_text="the dataset's"
    )


class AttackConfig(OptionGroup):
    """Method."""

    method: str = option("m+trades", "Training method; `deat-rb methods` lists them.", metavar="NAME")
    setting: str = option(
        "fast", "Training setting: the paper's fast (cyclic LR, few epochs) or standard (50 epochs), or fastat, the "
        "protocol of FastAT Benchmark.", choices=SETTINGS,
    )  # fmt: skip
    norm: Literal["Linf", "L2"] = option("Linf", "Norm of the perturbation.", default_text="method's: Linf")
    eps: Fraction = option(8 / 255, "Perturbation radius, such as 8/255, or 0.5 in L2.")
    alpha: Fraction | None = option(
        None, "Step size of the attack, such as 2/255.", default_text="method's", gt=0, allow_inf_nan=False
    )
    steps: int | None = option(
        None, "Number of attack steps; in the first epoch, if a schedule increases it.", default_text="method's", ge=0
    )
    max_steps: int | None = option(None, "Maximum number of attack steps of a schedule.", default_text="method's", ge=1)
    gamma: float | None = option(
        None, "Threshold factor gamma of the gradient-magnitude schedule, or of the stopping rule by gradient "
        "magnitude.", gt=0, allow_inf_nan=False,
    )  # fmt: skip
    beta: float | None = option(
        None, "Weight of the regularization term of TRADES and MART.", default_text="method's: 6", ge=0,
        allow_inf_nan=False,
    )  # fmt: skip
    label_smoothing: float | None = option(
        None, "Label smoothing of the cross-entropy in the training loss, such as 0.1; not for MART.", ge=0, lt=1
    )
    class_weights: Literal["none", "balanced"] = option(
        "none", "Weights of the classes in the training loss: balanced gives all classes the same total weight."
    )
    tau: int | None = option(
        None, "Patience tau of friendly attacks: steps after misclassification.", default_text="method's: 3", ge=0
    )
    omega: float | None = option(
        None, "Standard deviation of the noise added after each step of friendly attacks.",
        default_text="method's: 0.001 for fat-N, else 0", ge=0, allow_inf_nan=False,
    )  # fmt: skip
    align: float | None = option(
        None, "Weight of gradient alignment in gradalign.", default_text="method's: 0.2", ge=0, allow_inf_nan=False
    )
    consistency: float | None = option(
        None, "Weight of the penalty on the change of the prediction in fgsm-pgi and liet.",
        default_text="method's: 10 fgsm-pgi, 100 liet", ge=0, allow_inf_nan=False,
    )  # fmt: skip
    prior_reset: int | None = option(
        None, "Reset the perturbations that fgsm-pgi keeps for each image after this many epochs.",
        default_text="method's: 40", ge=1,
    )  # fmt: skip
    carry: bool | None = option(
        None, "Carry FREE's perturbation over from batch to batch; otherwise it is reset to zero in each batch.",
        default_text="setting's: yes fast, no standard",
    )  # fmt: skip
    attack_mode: Literal["train", "eval"] | None = option(
        None, "Mode of the model while adversarial examples are generated.", default_text="method's"
    )
    eps_warmup: int | None = option(
        None, "Let eps and alpha of training rise linearly from 0 over this many epochs.", default_text="0", ge=0
    )
    awp: float | None = option(
        None, "Adversarial weight perturbation (AWP): its size relative to the weights, such as 0.005.",
        metavar="GAMMA", default_text="off", gt=0, lt=1,
    )  # fmt: skip
    awp_warmup: int | None = option(None, "Begin AWP after this many epochs.", default_text="0", ge=0)
    lr_per_replay: bool = option(False, "Update the learning rate after each replay, as FREE's public code does.")


class OutputConfig(OptionGroup):
    """Output."""

    track: tuple[str, ...] = option(
        (), "Log to an experiment tracker: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab or "
        "trackio; may be repeated.", metavar="NAME", may_change=True,
    )  # fmt: skip
    project: str = option(
        "deat-rb", "Project (experiment) of the tracker in which the run is logged under its name.", metavar="NAME",
        may_change=True, min_length=1,
    )  # fmt: skip
    curve_test: int | None = option(
        None, "Attack this many test images after each epoch, only for a plot; no selection depends on it.", ge=1
    )


FORMER_NAMES = {"heed_stop": "early_stopping", "compiled": "compile"}
"""Names of options in earlier versions, mapped to the current names."""


class TrainOptions(BaseModel):
    """Options of a training run, by group.

    Options may also be given without groups, as in the ``config.json`` of earlier versions. Options that are missing or
    None take the default of the method, the setting or the dataset.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: AttackConfig = AttackConfig()
    optim: OptimConfig = OptimConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="before")
    @classmethod
    def _in_groups(cls, values: Any) -> Any:
        return nest(values) if isinstance(values, Mapping) else values

    def flat(self) -> dict[str, Any]:
        """Return all options by name."""
        return {name: value for group in GROUPS for name, value in getattr(self, group)}

    def explicit(self) -> dict[str, Any]:
        """Return the options that were set explicitly and are not None, by name."""
        return {name: value for group in GROUPS for name, value in getattr(self, group).explicit().items()}

    def method_options(self) -> dict[str, Any]:
        """Return the options for `deat_rb.create`; None means the method's default."""
        values = {name: getattr(self.attack, name) for name in METHOD_OPTIONS}
        flags = {name for name in values if AttackConfig.model_fields[name].default is False}
        return {name: None if value is False and name in flags else value for name, value in values.items()}

    def but(self, **changes: Any) -> TrainOptions:
        """Return the same options with some changed.

        Raises:
            DeatError: A value is invalid.
        """
        return make_options({**self.explicit(), **changes})


GROUPS: dict[str, type[OptionGroup]] = {
    name: field.annotation
    for name, field in TrainOptions.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, OptionGroup)
}
"""The option groups by their key in ``config.json``."""

GROUP_OF = {name: key for key, group in GROUPS.items() for name in group.model_fields}

OTHER_OPTIONS = ("method", "setting", "eps", "class_weights")

METHOD_OPTIONS = tuple(name for name in AttackConfig.model_fields if name not in OTHER_OPTIONS)
"""Options that are passed to `deat_rb.create`."""


def train_options() -> list[Option]:
    """Return the descriptions of all options, in the order of the groups."""
    options = [each for group in GROUPS.values() for each in group.options()]
    return [replace(each, default=DEFAULT_TEXTS.get(each.name, each.default)) for each in options]


MAY_CHANGE = tuple(each.name for each in train_options() if each.may_change)
"""Options that ``--resume`` may change."""


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sort options by name into their groups; names and layout of earlier versions are also accepted.

    Options of those versions get the values that were fixed then: FREE's perturbation was always carried over from
    batch to batch, and FAT added no noise.
    """
    nested = dict(values)
    if isinstance(spec := nested.get("model"), Mapping) and "num_classes" in spec:  # before there were groups
        nested["network"] = nested.pop("model")
        method = str(nested.get("method", ""))
        nested |= {"carry": True} if method.startswith("free-") else {"omega": 0.0} if method.startswith("fat-") else {}
    if isinstance(nested.get("conduct"), Mapping):
        nested.update(nested.pop("conduct"))
    for name in list(nested):
        option_name = FORMER_NAMES.get(name, name)
        if option_name in GROUP_OF and name not in GROUPS:
            value, key = nested.pop(name), GROUP_OF[option_name]
            if value is not None:
                group = nested.get(key, {})
                if isinstance(group, Mapping | OptionGroup):  # anything else is refused as a group
                    nested[key] = {**dict(group), option_name: value}
    return nested


def had_another_start(config: Mapping[str, Any]) -> bool:
    """Return whether a run's configuration is from a version in which its method's attack had a different start.

    Such configurations lack ``omega``: TRADES, MART and their guided forms started from clamped noise, FAT-N from
    0.001 N(0,1); see docs/methods.md.

    Args:
        config: The run's configuration as JSON values, grouped or in the layout of earlier versions.
    """
    attack = {**config, **config.get("attack", {})}
    changed = re.fullmatch(r"(m\+)?(trades|mart)|fat-\d+", str(attack.get("method", "")))
    return changed is not None and "omega" not in attack


def read_options(path: str | Path) -> dict[str, Any]:
    """Read options from the ``config.json`` of a run, or from a file written by hand.

    Returns:
        The options that the file sets, by name.

    Raises:
        DeatError: The file does not contain valid training options.
    """
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise DeatError(f"{path} does not contain a JSON object of training options; give a run's config.json")
    facts = {"network", "classes", "data_fingerprint", "extra_fingerprint", "init_sha256", "train_images", "val_images",
             "versions"}  # fmt: skip
    return make_options({key: value for key, value in nest(content).items() if key not in facts}).explicit()


def make_options(values: Mapping[str, Any], prefix: str = "--") -> TrainOptions:
    """Return validated options.

    Args:
        values: The options by name.
        prefix: Prefix of their names in error messages, as for `deat_rb.utils.options.validate`.

    Raises:
        DeatError: An option is invalid; the message names the first one and its value.
    """
    return validate(TrainOptions, values, prefix)


def options_markdown() -> str:
    """Return the content of ``docs/options.md``."""
    lines = [
        "# Options of `deat-rb train`",
        "",
        "Generated from the option groups by `python -m deat_rb.runs.options > docs/options.md`. In Python they are",
        "the keys of `deat_rb.train({...})`. Those of *Method* but `setting` are the keywords of `deat_rb.create`,",
        "where `class_weights` is a number for each class; those of *Optimization* and *Runtime* are `trainer.fit`'s.",
    ]
    title = ""
    for each in train_options():
        if each.group != title:
            title = each.group
            lines += ["", f"## {title}", "", "| option | value | default | meaning |", "|---|---|---|---|"]
        value = ", ".join(f"`{choice}`" for choice in each.choices) or ("-" if each.kind not in ("value", "many") else
                          f"{each.metavar.lower()}{f', {each.bounds}' if each.bounds else ''}")  # fmt: skip
        meaning = each.help.replace("|", "\\|").replace("<", "&lt;")  # neither a cell's end nor a tag of HTML
        lines.append(f"| `{each.flag}` | {value} | {each.default or '-'} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(options_markdown(), end="")
