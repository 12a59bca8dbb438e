"""HTML report of an evaluation, as a self-contained page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.data.images import LabeledImages
from deat_rb.evaluation.frozen_model import prepared_for_eval, select_images
from deat_rb.evaluation.report import SKIPPED, AttackResult, Check, Report, worst_of
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted, new_environment
from deat_rb.utils.units import format_fraction

MISCLASSIFIED_SHOWN, ROBUST_SHOWN = 18, 6

PAIRS_SHOWN = 12

LINES_SHOWN = 6

CLASSES_SHOWN = 100

LARGEST_IMAGE = 160

BAR = 144

MARKS = {"pass": "✓", "warn": "!", "fail": "✕"}


def render_page(
    report: Report,
    *,
    images: Tensor | LabeledImages,
    labels: Tensor,
    classes: Sequence[str],
    predictions: Mapping[str, Tensor] | None = None,
    training: Mapping[str, str] | None = None,
    curves: bytes = b"",
) -> bytes:
    """Render a report as an HTML page with accuracies, checks, sweep, classes, confusions, examples and provenance.

    Args:
        report: The report. Examples are shown if it has adversarial images.
        images: The evaluated images, in [0, 1], (N, C, H, W).
        labels: (N,).
        classes: Class names, in the order of the labels.
        predictions: Predicted classes (N,) by attack and for ``natural``, from `predictions_of`; without them neither
            confusions nor predictions are shown.
        training: Facts about the training, such as its cost, by name.
        curves: PNG of the training's curves.

    Returns:
        The page, encoded in UTF-8.

    Raises:
        DeatError: The number of images or labels differs from the report.
    """
    if not len(images) == len(labels) == report.n_examples:
        raise DeatError(
            f"the report covers {counted(report.n_examples, 'example', '')}, not {counted(len(images), 'image', '')} "
            f"with {counted(len(labels), 'label', '')}: give the images that were evaluated"
        )
    content = _content(report, images, labels.cpu(), _Names(classes), predictions or {})
    content |= {"training": training or {}, "curves": _data_url(curves) if curves else ""}
    return new_environment("deat_rb.evaluation").get_template("report.html.j2").render(content).encode()


def predictions_of(
    model: nn.Module,
    report: Report,
    images: Tensor | LabeledImages,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Predict the classes of the evaluated images and of a report's adversarial images.

    Args:
        model: The evaluated model; it is left unchanged.
        report: The report, with its adversarial images.
        images: The evaluated images, in [0, 1], (N, C, H, W).
        batch_size: Number of images per batch.
        device: Device to run on; by default the model's.

    Returns:
        Predicted classes (N,) on the CPU, by attack and for ``natural``.
    """
    with prepared_for_eval(model, images, batch_size=batch_size, device=device) as prepared:
        adversarial = {name: prepared.predict(adv) for name, adv in report.adversarial.items()}
        return {"natural": prepared.predict(), **adversarial}


class _Names:
    """Class names; a class without a name is shown by its number."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes

    def __getitem__(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)


def _content(
    report: Report, images: Tensor | LabeledImages, labels: Tensor, names: _Names, predictions: Mapping[str, Tensor]
) -> dict[str, Any]:
    rows = [*report.results.values(), *([report.worst_case] if len(report.results) > 2 else [])]
    sources = [value for name, value in report.provenance.items() if name in ("run", "model", "weights")]
    title = next(iter(sources), "Evaluation")
    shown, hidden = _classes(report, labels, names)
    return {
        "title": title,
        "subtitle": counted(report.n_examples, "image", "")
        + (f" of {report.provenance['dataset']}" if "dataset" in report.provenance else "")
        + f", {report.norm} at eps {format_fraction(report.eps)}"
        + (f", in {report.precision}" if report.precision != "fp32" else ""),
        "report": report,
        "cards": _cards(report),
        "notes": (*report.notes, *([report.provenance["note"]] if "note" in report.provenance else ())),
        "attacks": [_attack_row(result, report) for result in rows],
        "attack_notes": [(result.name, note) for result in report.results.values() for note in result.notes],
        "checks": [check for check in _by_severity(report) if check.status != "pass"],
        "passed": [check for check in _by_severity(report) if check.status == "pass"],
        "marks": MARKS,
        "curve": _curve(report),
        "classes": shown,
        "hidden_classes": hidden,
        "balanced": _balanced(report, labels),
        "pairs": _pairs(report, labels, names, predictions),
        "examples": _examples(report, images, labels, names, predictions),
        "amplified": f"amplified {0.5 / report.eps:.3g} times"
        if _has_common_scale(report)
        else "amplified to the full range",
        "facts": _facts(report),
    }


def _by_severity(report: Report) -> list[Check]:
    return sorted(report.checks, key=lambda check: ("fail", "warn", "pass").index(check.status))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _cards(report: Report) -> list[dict[str, str]]:
    def card(name: str, result: AttackResult) -> dict[str, str]:
        interval = f"{100 * result.low:.1f} to {100 * result.high:.1f}"
        return {"name": name, "value": _percent(result.accuracy), "note": f"95 %: {interval}", "status": ""}

    cards = [card("without an attack", report.results["natural"])]
    if len(report.results) > 1:
        bound = " (upper bound)" if report.precision != "fp32" else ""
        count = len(report.results) - 1
        cards.append(card(f"worst case of {count} attack{'' if count == 1 else 's'}{bound}", report.worst_case))
    if report.checks:
        done = [check for check in report.checks if check.name != SKIPPED]
        counts = Counter(check.status for check in done)
        worst = "fail" if counts["fail"] else "warn" if counts["warn"] else "pass"
        note = f"{counts['fail']} fail, {counts['warn']} warn"
        note += "".join(f", {check.figure:.0f} skipped" for check in report.checks if check.name == SKIPPED)
        value = f"{counts['pass']} of {len(done)}"
        cards.append({"name": "checks passed", "value": value, "note": note, "status": worst})
    return cards


def _attack_row(result: AttackResult, report: Report) -> dict[str, Any]:
    return {
        "result": result,
        "worst": result is report.worst_case,
        "natural": result.name == "natural",
        "accuracy": _percent(result.accuracy),
        "interval": f"{100 * result.low:.2f} to {100 * result.high:.2f}",
        "width": round(BAR * result.accuracy, 1),
        "low": round(BAR * result.low, 1),
        "high": round(BAR * result.high, 1),
        "forwards": f"{result.forwards:,}",
        "backwards": f"{result.backwards:,}",
        "seconds": f"{result.seconds:,.1f}",
    }


def _curve(report: Report) -> dict[str, Any] | None:
    """Return the lines, ticks and labels of a sweep, as coordinates in a 640 x 300 chart."""
    points = report.curve
    if len(points) < 2:
        return None
    widest = max(point.eps for point in points) or 1.0

    def position(eps: float, accuracy: float) -> tuple[float, float]:
        return round(52 + 576 * eps / widest, 1), round(252 - 240 * accuracy, 1)

    series = {name: [point.accuracy[name] for point in points] for name in points[0].accuracy if name != "natural"}
    chosen = dict(list(series.items())[:LINES_SHOWN])
    if len(series) > 1:
        chosen["worst case"] = [point.worst_case for point in points]
    lines = []
    for number, (name, accuracies) in enumerate(chosen.items()):
        positions = [position(point.eps, accuracy) for point, accuracy in zip(points, accuracies, strict=True)]
        texts = [f"{name}, eps {format_fraction(point.eps)}: {_percent(accuracy)}"
                 for point, accuracy in zip(points, accuracies, strict=True)]  # fmt: skip
        lines.append(
            {
                "name": name,
                "worst": name == "worst case",
                "colour": LINES_SHOWN if name == "worst case" else number,
                "points": " ".join(f"{x},{y}" for x, y in positions),
                "dots": [(x, y, text) for (x, y), text in zip(positions, texts, strict=True)],
            }
        )
    x_ticks, last = [], -100.0
    for point in points:
        at = position(point.eps, 0)[0]
        if at - last >= 48:
            x_ticks.append({"at": at, "text": format_fraction(point.eps)})
            last = at
    y_ticks = [{"at": position(0, share)[1], "text": f"{100 * share:.0f} %"} for share in (0, 0.25, 0.5, 0.75, 1)]
    return {"lines": lines, "x_ticks": x_ticks, "y_ticks": y_ticks, "hidden": max(0, len(series) - LINES_SHOWN)}


def _classes(report: Report, labels: Tensor, names: _Names) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each class with examples, the least robust first, and the number of rows not shown."""
    if not report.verdicts:
        return [], 0
    natural, worst = report.verdicts["natural"], worst_of(report.verdicts)
    rows = []
    for label in labels.unique().tolist():
        members = labels == label
        clean, robust = float(natural[members].float().mean()), float(worst[members].float().mean())
        row = {"name": names[label], "count": int(members.sum()), "clean": _percent(clean), "worst": _percent(robust)}
        rows.append(
            (robust, label, row | {"clean_width": round(BAR * clean, 1), "worst_width": round(BAR * robust, 1)})
        )
    rows.sort(key=lambda each: each[:2])
    return [row for _, _, row in rows[:CLASSES_SHOWN]], max(0, len(rows) - CLASSES_SHOWN)


def _balanced(report: Report, labels: Tensor) -> tuple[str, str] | None:
    """Return clean and worst-case accuracy, averaged over the classes with examples."""
    if not report.verdicts:
        return None
    members = [labels == label for label in labels.unique()]
    clean, robust = (torch.stack([correct[mask].double().mean() for mask in members]).mean()
                     for correct in (report.verdicts["natural"], worst_of(report.verdicts)))  # fmt: skip
    return _percent(float(clean)), _percent(float(robust))


def _first_attack(report: Report, among: Iterable[str]) -> list[str | None]:
    """Return, for each example, the first of the attacks ``among`` that makes it misclassified, or None."""
    first: list[str | None] = [None] * report.n_examples
    natural = report.verdicts["natural"]
    for name in report.results:
        if name in among and name != "natural":
            for row in (natural & ~report.verdicts[name]).nonzero().flatten().tolist():
                first[row] = first[row] or name
    return first


def _pairs(report: Report, labels: Tensor, names: _Names, predictions: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return the most frequent confusions under attack; nothing if the images of an attack were not kept."""
    if not report.verdicts or not report.results.keys() <= predictions.keys():
        return []
    clean = Counter(zip(labels.tolist(), predictions["natural"].tolist(), strict=True))
    attacked: Counter[tuple[int, int]] = Counter()
    for row, name in enumerate(_first_attack(report, predictions)):
        attacked[int(labels[row]), int(predictions[name or "natural"][row])] += 1
    counts = Counter(labels.tolist())
    wrong = [(pair, count) for pair, count in attacked.most_common() if pair[0] != pair[1]]
    return [
        {
            "true": names[true],
            "predicted": names[predicted],
            "attacked": count,
            "share": _percent(count / counts[true]),
            "clean": clean[true, predicted],
        }
        for (true, predicted), count in wrong[:PAIRS_SHOWN]
    ]


def _examples(
    report: Report, images: Tensor | LabeledImages, labels: Tensor, names: _Names, predictions: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return misclassified examples, alternating between classes, and some robust ones."""
    stored = {name: adv for name, adv in report.adversarial.items() if name in report.verdicts}
    if not stored:
        return []
    first_attack = _first_attack(report, stored)
    strongest = min(stored, key=lambda name: report.results[name].accuracy)
    natural = report.verdicts["natural"].tolist()
    misclassified = _interleave([row for row, name in enumerate(first_attack) if name], labels)[:MISCLASSIFIED_SHOWN]
    robust = [row for row, name in enumerate(first_attack) if natural[row] and not name]
    shown = []
    for row in (*misclassified, *_interleave(robust, labels)[:ROBUST_SHOWN]):
        name = first_attack[row] or strongest
        clean = select_images(images, torch.tensor([row])).cpu()[0]
        attacked, delta = stored[name][row], stored[name][row] - clean
        size = report.eps if _has_common_scale(report) else max(float(delta.abs().max()), 1e-12)
        has_predictions = name in predictions and "natural" in predictions
        shown.append(
            {
                "number": row,
                "label": names[int(labels[row])],
                "before": names[int(predictions["natural"][row])] if has_predictions else None,
                "after": names[int(predictions[name][row])] if has_predictions else None,
                "misclassified": first_attack[row] is not None,
                "attack": name,
                "clean": _png(clean),
                "delta": _png(0.5 + delta / (2 * size)),
                "attacked": _png(attacked),
            }
        )
    return shown


def _has_common_scale(report: Report) -> bool:
    return report.norm == "Linf" and report.eps > 0


def _interleave(rows: list[int], labels: Tensor) -> list[int]:
    """Reorder examples so that their classes alternate."""
    seen: Counter[int] = Counter()
    keys = []
    for row in rows:
        label = int(labels[row])
        keys.append((seen[label], label, row))
        seen[label] += 1
    return [row for _, _, row in sorted(keys)]


def _png(image: Tensor) -> str:
    """Return an image (C, H, W) as a PNG data URI; its channels are averaged unless there are 3."""
    from PIL import Image

    values = image.float().nan_to_num().clamp(0, 1)
    values = values if len(values) == 3 else values.mean(dim=0, keepdim=True).expand(3, -1, -1)
    picture = Image.fromarray((255 * values).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    if max(picture.size) > LARGEST_IMAGE:
        picture.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
    file = io.BytesIO()
    picture.save(file, format="png", optimize=True)
    return _data_url(file.getvalue())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _facts(report: Report) -> list[tuple[str, str]]:
    settings = {
        "norm": report.norm,
        "eps": format_fraction(report.eps),
        "seed": str(report.seed),
        "batch size": str(report.batch_size),
        "precision": f"{report.precision} (TF32; verdicts in float32)" if report.tf32 else report.precision,
        "memory format": report.layout,
        "energy": "" if report.worst_case.energy_kwh is None else f"{report.worst_case.energy_kwh:.4f} kWh",
        "device": report.device,
        "SHA-256 of weights and buffers": report.model_sha256,
        "SHA-256 of the examples": report.examples_sha256,
    }
    provenance = {name.replace("_", " "): value for name, value in report.provenance.items()}
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [(name, value) for name, value in {**provenance, **settings, "versions": versions}.items() if value]
