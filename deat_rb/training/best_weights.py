"""Best weights: the callback that keeps and saves the best and last weights, and loads the selected ones at the end."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from deat_rb.training.callbacks import Callback
from deat_rb.training.checkpoint import host_copies
from deat_rb.training.history import History
from deat_rb.training.metrics import EpochStats
from deat_rb.training.state import EpochWeights
from deat_rb.utils.module_state import load_tensors_into


class BestWeights(Callback):
    """Keep the weights of the epoch with the highest robust validation accuracy and of the newest epochs.

    Ties go to the higher natural accuracy, then to the earlier epoch. If ``best`` is selected, the newest epoch counts
    as the best until one is validated, so that there is a result after every epoch. When a stopping rule ends training,
    the epochs after the one that it keeps are dropped. With ``ema`` these are the averaged weights; the raw ones of the
    same epochs are saved as well.

    Args:
        select: The weights to load into the model after training: ``best`` or ``last``.
    """

    def __init__(self, select: str) -> None:
        self.select = select
        self.written: dict[str, int] = {}
        """Epoch of the weights in each of the run's weights files, by file name."""

    def on_epoch_end(self, row: EpochStats) -> None:
        """Write the weights of the epoch, and of the best one if it has changed."""
        state, recent = self.state, self.state.recent
        if len(recent) == recent.maxlen:
            state.settled = _most_robust([state.settled, recent[0]])
        raw = None if state.average is None else _copy(state.model)
        with state.averaged():
            recent.append(EpochWeights(row, _copy(state.model), raw))
        while state.stop is not None and recent[-1].row.epoch > state.stop.keep and len(recent) > 1:
            recent.pop()
        self.write()

    def on_fit_end(self, history: History) -> None:
        """Load the selected weights into the model."""
        best = self._best() if self.select == "best" else None
        selected = best or self.state.recent[-1]
        history.selected = selected.row.epoch
        load_tensors_into(self.state.model, selected.weights)

    def write(self) -> None:
        """Start writing the best and the last weights to the run, unless its files already hold them."""
        run, recent = self.state.run, self.state.recent
        if run is None or not self.state.world.is_main:
            return
        newest = {"best": self._best(), "last": recent[-1] if recent else None}

        def write() -> None:
            for which, epoch in newest.items():
                if epoch is None:
                    run.discard_weights(which)
                    run.discard_weights(f"{which}-raw")
                elif self.written.get(which) != epoch.row.epoch:
                    run.save_weights(which, epoch.weights, epoch.row)
                    if epoch.raw is not None:
                        run.save_weights(f"{which}-raw", epoch.raw, epoch.row)
                    self.written[which] = epoch.row.epoch

        self.state.writer.start(write)

    def _best(self) -> EpochWeights | None:
        """Return the best epoch; if there was no validation yet and it is the result, the newest one."""
        state = self.state
        best = _most_robust([state.settled, *state.recent])
        if best is None and self.select == "best" and state.recent:
            best = state.recent[-1]
        return best


def _most_robust(epochs: Iterable[EpochWeights | None]) -> EpochWeights | None:
    validated = [epoch for epoch in epochs if epoch is not None and epoch.row.val_acc is not None]
    return max(validated, key=lambda epoch: (epoch.row.val_robust_acc or 0.0, epoch.row.val_acc or 0.0), default=None)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return host_copies(model.state_dict())
