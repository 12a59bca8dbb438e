"""``deat-rb train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import fraction, seed_list, size


@click.command()
@click.option("--method", help="What to train by, such as m+trades; `deat-rb methods` lists them.  [default: m+trades]")
@click.option("--dataset", help="digits, cifar10, cifar100 or folder.  [default: digits]")
@click.option(
    "--data-dir", help="Where the data are: CIFAR's files, or a folder with train/<class>/ and test/<class>/."
)
@click.option("--memory-limit", type=size, metavar="SIZE",
              help="Read a folder whose decoded images exceed this, such as 8G, by worker processes.")  # fmt: skip
@click.option("--image-size", type=int, help="What a folder's images are resized to.  [default: 32]")
@click.option("--train-size", type=int, help="Use so many training images only, each class in proportion.")
@click.option("--val-size", type=int, help="Hold out so many training images for validation.")
@click.option("--arch", help="preactresnet18, wrn-D-W, timm:NAME, torchvision:NAME or package.module:factory.")
@click.option("--init-from", help="Begin with the weights of this checkpoint.")
@click.option("--setting", help="The paper's: fast (cyclic LR, few epochs) or standard (50 epochs).  [default: fast]")
@click.option("--epochs", type=int, help="A run that is resumed may get more, unless its LR is cyclic.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--lr-schedule", help="cyclic, multistep or flat.")
@click.option("--lr-epochs", type=int, help="Have a multistep LR come down as in so many epochs.  [default: --epochs]")
@click.option("--momentum", type=float)
@click.option("--weight-decay", type=float)
@click.option("--batch-size", type=int)
@click.option("--eps", type=fraction, help="Radius, such as 8/255.")
@click.option("--alpha", type=fraction, help="Step size, such as 2/255.")
@click.option("--steps", type=int, help="Steps of the attack; the first epoch's where a schedule raises them.")
@click.option("--max-steps", type=int, help="The bound of a schedule.")
@click.option("--gamma", type=float, help="Relaxation of the magnitude's threshold.")
@click.option("--beta", type=float, help="Weight of the regulariser of TRADES and MART.")
@click.option("--tau", type=int, help="Patience of friendly crafting.")
@click.option("--attack-mode", help="The model's mode while crafting: train or eval.")
@click.option(
    "--lr-per-replay", is_flag=True, default=None, help="Move the LR with each replay, as FREE's public code."
)
@click.option(
    "--no-stop", "heed_stop", flag_value=False, default=None, help="Note where the method's rule would stop, and go on."
)
@click.option(
    "--on-nonfinite", help="When a loss, a gradient or l_X is not finite: stop, or skip the batch.  [default: stop]"
)
@click.option("--compile", "compiled", is_flag=True, default=None, help="Have torch.compile make the passes.")
@click.option("--sync-bn", is_flag=True, default=None, help="BatchNorm's statistics over all processes; GPUs only.")
@click.option("--precision", help="fp32, bf16, fp16 or auto.")
@click.option("--device", help="cpu, cuda, cuda:1, mps or auto.  [default: auto]")
@click.option("--seed", type=int, help="Fixes every random number.  [default: 0]")
@click.option(
    "--seeds", type=seed_list, metavar="0,1,2", help="Train with each of these seeds, and report mean and deviation."
)
@click.option("--select", help="Which epoch is the result: best (on validation) or last.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Take options from a run's config.json; flags override."
)
@click.option("--name", help="The run's name.")
@click.option("--output", default="runs", show_default=True, help="The folder of the runs.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run that was stopped.")
@click.option("--trust-code", is_flag=True,
              help="Let a run or --config that is another's build its network by package.module:factory.")  # fmt: skip
@click.option("--save-every", type=float, metavar="MINUTES", help="Checkpoint so often.  [default: 5]")
@click.option(
    "--track", multiple=True, metavar="NAME", help="Tell a tracker of each epoch, such as tensorboard; may be repeated."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and its costs, and train nothing.")
def train(
    config: Path | None,
    name: str | None,
    output: str,
    dry_run: bool,
    seeds: tuple[int, ...] | None,
    resume: Path | None,
    save_every: float | None,
    track: tuple[str, ...],
    memory_limit: int | None,
    trust_code: bool,
    **flags: Any,
) -> None:
    """Train a network by one of the methods.

    Without options: M+TRADES on the embedded digits, a few minutes on a laptop. Images are in [0, 1], and so are --eps
    and --alpha. The run directory keeps configuration, metrics, weights and curves.
    """
    from deat_rb.cli.progress import TrainingProgress, print_plan, print_result, print_seeds
    from deat_rb.models.names import check_trust
    from deat_rb.runs.config import make_options, read_options
    from deat_rb.runs.directory import check_free, check_name
    from deat_rb.runs.plan import default_name, plan
    from deat_rb.runs.train import resume as resume_training
    from deat_rb.runs.train import train as run_training
    from deat_rb.runs.train import train_seeds
    from deat_rb.utils.distributed import is_main
    from deat_rb.utils.errors import DeatError

    if name is not None:
        check_name(name)
    given = {key: value for key, value in flags.items() if value is not None}
    if seeds and "seed" in given:
        raise DeatError(f"--seed {given['seed']} and --seeds {','.join(map(str, seeds))} exclude each other; give one")
    how: dict[str, Any] = {"track": track or None, "save_every": save_every, "memory_limit": memory_limit}
    if resume is not None:
        if config is not None or name is not None or seeds or dry_run:
            raise DeatError("--resume goes on with a run as it is: leave out --config, --name, --seeds and --dry-run")
        with TrainingProgress() as progress:
            run, history = resume_training(resume, given, callbacks=[progress], trust_code=trust_code, **how)
        if is_main():
            print_result(run, history)
        return
    options = read_options(config) if config is not None else {}
    if "arch" not in given and isinstance(options.get("arch"), str):
        check_trust(options["arch"], trust_code, source=str(config))
    for option in ("method", "setting"):
        if option in given and options.get(option, given[option]) != given[option]:
            raise DeatError(
                f"--{option} {given[option]} beside --config: {config} spells out all that {options[option]} stands "
                "for; leave --config out and give the options that are to stay"
            )
    asked = make_options({"method": "m+trades", **options, **given})
    planned = plan(asked, memory_limit=memory_limit)
    if not (dry_run or seeds or planned.processes > 1):
        check_free(Path(output) / (name or default_name(planned.config)))
    if is_main():
        print_plan(planned)
    if dry_run:
        return
    with TrainingProgress() as progress:
        how |= {"output": output, "name": name, "callbacks": [progress]}
        results = train_seeds(asked, seeds, **how) if seeds else [run_training(planned, **how)]
    if not is_main():
        return
    for run, history in results:
        print_result(run, history)
    if seeds:
        print_seeds(results)
