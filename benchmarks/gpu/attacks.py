"""Stages that time the attacks of an evaluation on the network that ``table1`` trained last."""

from __future__ import annotations

import time
from unittest import mock

from torch import nn

from benchmarks.evaluation import EvalTarget, against_torchattacks
from benchmarks.gpu.session import Session
from benchmarks.gpu.table1 import costs, test_images
from deat_rb import evaluate
from deat_rb.attacks.captured import captures_for
from deat_rb.evaluation.report import Report

EPS = 8 / 255
GRAPHS_WARM_UP = 16
"""Number of images that the stage ``graphs`` attacks first."""


def torchattacks(session: Session) -> None:
    """Time PGD-100 beside torchattacks' PGD, whose step size is the same, on the first test images."""
    options = session.options
    method, model = _last(session)
    images, labels = test_images(session, options.test_size)
    target = EvalTarget(model.to(session.device), images, labels, EPS, method)
    found = against_torchattacks(target, batch_size=options.eval_batch, repeats=2)
    session.record(
        "torchattacks",
        method=method,
        images=found.examples,
        ours=[round(seconds, 2) for seconds in found.ours],
        theirs=[round(seconds, 2) for seconds in found.theirs],
        speedup=round(found.speedup, 2),
        robust=[round(100 * share, 2) for share in (found.ours_accuracy, found.theirs_accuracy)],
    )


def autoattack(session: Session) -> None:
    """Time AutoAttack's standard version on the test images; each of its stages is recorded when it ends."""
    options = session.options
    method, model = _last(session)
    images, labels = test_images(session, options.autoattack_size)
    began = time.monotonic()

    def note_stage(name: str, done: int, total: int, robust: int) -> None:
        if done == total:
            seconds = round(time.monotonic() - began, 1)
            session.record("autoattack", method=method, part=name, images=total, seconds=seconds, robust=robust)

    report = evaluate(model, images, labels, attacks="autoattack", eps=EPS, batch_size=options.eval_batch,
                      device=session.device, keep_adversarial=False, progress=note_stage)  # fmt: skip
    session.record(
        "autoattack",
        method=method,
        images=len(images),
        seconds=round(time.monotonic() - began, 1),
        **{name: round(100 * result.accuracy, 2) for name, result in report.results.items()},
        **costs(report),
    )


def graphs(session: Session) -> None:
    """Time Square on a few test images with and without CUDA graphs; PGD, in which examples leave, has none.

    An evaluation of the first images, which is not timed, loads what both use.
    """
    options = session.options
    method, model = _last(session)
    images, labels = test_images(session, options.graphs_size)

    def measured(count: int) -> Report:
        return evaluate(model, images[:count], labels[:count], attacks="square", eps=EPS, device=session.device,
                        batch_size=options.eval_batch, keep_adversarial=False)  # fmt: skip

    measured(GRAPHS_WARM_UP)
    for enabled in (True, False):
        replaced = captures_for if enabled else lambda *_: None
        with mock.patch("deat_rb.evaluation.evaluate.captures_for", replaced):
            report = measured(len(images))
        session.record(
            "graphs",
            method=method,
            images=len(images),
            enabled=enabled,
            seconds={name: round(result.seconds, 2) for name, result in report.results.items()},
            robust={name: round(100 * result.accuracy, 2) for name, result in report.results.items()},
        )


def _last(session: Session) -> tuple[str, nn.Module]:
    if not session.trained:
        raise RuntimeError("no network is trained: run the stage table1 before")
    return list(session.trained.items())[-1]
