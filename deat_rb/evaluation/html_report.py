"""An evaluation as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.evaluation.report import LEFT_OUT, AttackResult, Report, worst_of
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import atomic_write
from deat_rb.utils.module_state import preserve_state
from deat_rb.utils.text import new_environment
from deat_rb.utils.units import format_fraction

BROKEN_SHOWN, WITHSTANDING_SHOWN = 18, 6

PAIRS_SHOWN = 12

LINES_SHOWN = 6

CLASSES_SHOWN = 100

LARGEST_PICTURE = 160

BAR = 144

MARKS = {"pass": "✓", "warn": "!", "fail": "✕"}


def render_page(
    report: Report,
    *,
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    predictions: Mapping[str, Tensor] | None = None,
) -> bytes:
    """Makes a page that shows a report: figures, checks, curve, classes, confusions, examples and provenance.

    Args:
        report: The evaluation. Examples are shown if it holds adversarial images.
        images: What was evaluated, in [0, 1], (N, C, H, W).
        labels: (N,).
        classes: Names, in the order of the labels.
        predictions: By attack and for ``natural``, the predicted classes (N,), see `predictions_of`; without them
            neither confusions nor predictions are shown.

    Returns:
        The page in UTF-8.

    Raises:
        DeatError: If the images are not those of the report.
    """
    if not len(images) == len(labels) == report.n_examples:
        raise DeatError(
            f"the report is of {report.n_examples} examples, and {len(images)} images with {len(labels)} labels were "
            "given to its page: give those that were evaluated"
        )
    content = _content(report, images.cpu(), labels.cpu(), _Names(classes), predictions or {})
    return new_environment("deat_rb.evaluation").get_template("report.html.j2").render(content).encode()


def write_page(
    report: Report,
    path: str | Path,
    *,
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    predictions: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes the page of `render_page` to the ``.html`` file ``path``, and gives that back.

    Raises:
        DeatError: If the images are not those of the report, or the page cannot be written.
    """
    path = Path(path)
    page = render_page(report, images=images, labels=labels, classes=classes, predictions=predictions)
    atomic_write(path, page)
    return path


def predictions_of(
    model: nn.Module, report: Report, images: Tensor, *, batch_size: int = 128, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Finds what a model takes the images and a report's adversarial images for.

    Args:
        model: What was evaluated; afterwards it is as it was.
        report: With its adversarial images.
        images: What was evaluated, in [0, 1], (N, C, H, W).
        batch_size: How many images are forwarded together.
        device: Where to run; by default where the model is.

    Returns:
        By attack and for ``natural``, classes (N,) on the CPU.
    """
    home = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
    target = torch.device(device) if device is not None else home
    stored = {"natural": images, **report.adversarial}
    with preserve_state(model), torch.no_grad():
        model.eval().to(target)
        try:
            return {
                name: torch.cat([model(part.to(target)).argmax(dim=1).cpu() for part in made.split(batch_size)])
                for name, made in stored.items()
            }
        finally:
            model.to(home)


class _Names:
    """Names of classes; a class without one has its number."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes

    def __getitem__(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)


def _content(
    report: Report, images: Tensor, labels: Tensor, names: _Names, predictions: Mapping[str, Tensor]
) -> dict[str, Any]:
    rows = [*report.results.values(), *([report.worst_case] if len(report.results) > 2 else [])]
    kept = {name: value for name, value in report.provenance.items() if name in ("run", "model", "weights")}
    title = next(iter(kept.values()), "Evaluation")
    shown, hidden = _classes(report, labels, names)
    return {
        "title": title,
        "subtitle": f"{report.n_examples} images"
        + (f" of {report.provenance['dataset']}" if "dataset" in report.provenance else "")
        + f", {report.norm} at eps {format_fraction(report.eps)}"
        + (f", in {report.precision}" if report.precision != "fp32" else ""),
        "report": report,
        "cards": _cards(report),
        "notes": (*report.notes, *([report.provenance["note"]] if "note" in report.provenance else ())),
        "attacks": [_attack_row(result, report) for result in rows],
        "attack_notes": [(result.name, note) for result in report.results.values() for note in result.notes],
        "checks": sorted(report.checks, key=lambda check: ("fail", "warn", "pass").index(check.status)),
        "marks": MARKS,
        "curve": _curve(report),
        "classes": shown,
        "hidden_classes": hidden,
        "pairs": _pairs(report, labels, names, predictions),
        "examples": _examples(report, images, labels, names, predictions),
        "amplified": f"amplified {0.5 / report.eps:.3g} times"
        if _amplifies_alike(report)
        else "amplified to the full range",
        "facts": _facts(report),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _cards(report: Report) -> list[dict[str, str]]:
    def card(name: str, result: AttackResult) -> dict[str, str]:
        interval = f"{100 * result.low:.1f} to {100 * result.high:.1f}"
        return {"name": name, "value": _percent(result.accuracy), "note": f"95 %: {interval}", "status": ""}

    cards = [card("without an attack", report.results["natural"])]
    if len(report.results) > 1:
        bound = " (upper bound)" if report.precision != "fp32" else ""
        cards.append(card(f"worst case of {len(report.results) - 1} attacks{bound}", report.worst_case))
    if report.checks:
        made = [check for check in report.checks if check.name != LEFT_OUT]
        counts = Counter(check.status for check in made)
        worst = "fail" if counts["fail"] else "warn" if counts["warn"] else "pass"
        note = f"{counts['fail']} fail, {counts['warn']} warn"
        note += "".join(f", {check.figure:.0f} left out" for check in report.checks if check.name == LEFT_OUT)
        value = f"{counts['pass']} of {len(made)}"
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
    """Places a sweep's points in a picture of 640 x 300."""
    points = report.curve
    if len(points) < 2:
        return None
    widest = max(point.eps for point in points) or 1.0

    def place(eps: float, accuracy: float) -> tuple[float, float]:
        return round(52 + 576 * eps / widest, 1), round(252 - 240 * accuracy, 1)

    series = {name: [point.accuracy[name] for point in points] for name in points[0].accuracy if name != "natural"}
    chosen = dict(list(series.items())[:LINES_SHOWN])
    if len(series) > 1:
        chosen["worst case"] = [point.worst_case for point in points]
    lines = []
    for number, (name, accuracies) in enumerate(chosen.items()):
        places = [place(point.eps, accuracy) for point, accuracy in zip(points, accuracies, strict=True)]
        texts = [f"{name}, eps {format_fraction(point.eps)}: {_percent(accuracy)}"
                 for point, accuracy in zip(points, accuracies, strict=True)]  # fmt: skip
        lines.append(
            {
                "name": name,
                "worst": name == "worst case",
                "colour": LINES_SHOWN if name == "worst case" else number,
                "points": " ".join(f"{x},{y}" for x, y in places),
                "dots": [(x, y, text) for (x, y), text in zip(places, texts, strict=True)],
            }
        )
    x_ticks, last = [], -100.0
    for point in points:
        at = place(point.eps, 0)[0]
        if at - last >= 48:
            x_ticks.append({"at": at, "text": format_fraction(point.eps)})
            last = at
    y_ticks = [{"at": place(0, share)[1], "text": f"{100 * share:.0f} %"} for share in (0, 0.25, 0.5, 0.75, 1)]
    return {"lines": lines, "x_ticks": x_ticks, "y_ticks": y_ticks, "hidden": max(0, len(series) - LINES_SHOWN)}


def _classes(report: Report, labels: Tensor, names: _Names) -> tuple[list[dict[str, Any]], int]:
    """The classes that have examples, the least robust first, and how many more there are than are shown."""
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


def _breaking(report: Report, among: Iterable[str]) -> list[str | None]:
    """For every example the first of these attacks that broke it, if one did."""
    first: list[str | None] = [None] * report.n_examples
    natural = report.verdicts["natural"]
    for name in report.results:
        if name in among and name != "natural":
            for row in (natural & ~report.verdicts[name]).nonzero().flatten().tolist():
                first[row] = first[row] or name
    return first


def _pairs(report: Report, labels: Tensor, names: _Names, predictions: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    if "natural" not in predictions or not report.verdicts:
        return []
    clean = Counter(zip(labels.tolist(), predictions["natural"].tolist(), strict=True))
    attacked: Counter[tuple[int, int]] = Counter()
    for row, name in enumerate(_breaking(report, predictions)):
        attacked[int(labels[row]), int(predictions[name or "natural"][row])] += 1
    counts = Counter(labels.tolist())
    wrong = [(pair, count) for pair, count in attacked.most_common() if pair[0] != pair[1]]
    return [
        {
            "true": names[true],
            "taken_for": names[taken_for],
            "attacked": count,
            "share": _percent(count / counts[true]),
            "clean": clean[true, taken_for],
        }
        for (true, taken_for), count in wrong[:PAIRS_SHOWN]
    ]


def _examples(
    report: Report, images: Tensor, labels: Tensor, names: _Names, predictions: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Pictures of what was broken, the classes taking turns, and of some of what was not."""
    stored = {name: made for name, made in report.adversarial.items() if name in report.verdicts}
    if not stored:
        return []
    breaking = _breaking(report, stored)
    strongest = min(stored, key=lambda name: report.results[name].accuracy)
    natural = report.verdicts["natural"].tolist()
    broken = _in_turn([row for row, name in enumerate(breaking) if name], labels)[:BROKEN_SHOWN]
    whole = [row for row, name in enumerate(breaking) if natural[row] and not name]
    shown = []
    for row in (*broken, *_in_turn(whole, labels)[:WITHSTANDING_SHOWN]):
        name = breaking[row] or strongest
        attacked, delta = stored[name][row], stored[name][row] - images[row]
        size = report.eps if _amplifies_alike(report) else max(float(delta.abs().max()), 1e-12)
        known = name in predictions and "natural" in predictions
        shown.append(
            {
                "number": row,
                "label": names[int(labels[row])],
                "before": names[int(predictions["natural"][row])] if known else None,
                "after": names[int(predictions[name][row])] if known else None,
                "broken": breaking[row] is not None,
                "attack": name,
                "clean": _picture(images[row]),
                "delta": _picture(0.5 + delta / (2 * size)),
                "attacked": _picture(attacked),
            }
        )
    return shown


def _amplifies_alike(report: Report) -> bool:
    return report.norm == "Linf" and report.eps > 0


def _in_turn(rows: list[int], labels: Tensor) -> list[int]:
    """Orders examples so that their classes take turns."""
    seen: Counter[int] = Counter()
    turns = []
    for row in rows:
        label = int(labels[row])
        turns.append((seen[label], label, row))
        seen[label] += 1
    return [row for _, _, row in sorted(turns)]


def _picture(image: Tensor) -> str:
    """An image (C, H, W) as a PNG in a data URI; of other than 3 channels the mean is shown."""
    from PIL import Image

    values = image.float().nan_to_num().clamp(0, 1)
    values = values if len(values) == 3 else values.mean(dim=0, keepdim=True).expand(3, -1, -1)
    picture = Image.fromarray((255 * values).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    if max(picture.size) > LARGEST_PICTURE:
        picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    file = io.BytesIO()
    picture.save(file, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _facts(report: Report) -> list[tuple[str, str]]:
    settings = {
        "norm": report.norm,
        "eps": format_fraction(report.eps),
        "seed": str(report.seed),
        "batch size": str(report.batch_size),
        "precision": report.precision,
        "layout of the weights": report.layout,
        "device": report.device,
        "SHA-256 of weights and buffers": report.model_sha256,
        "SHA-256 of the examples": report.examples_sha256,
    }
    provenance = {name.replace("_", " "): value for name, value in report.provenance.items()}
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [(name, value) for name, value in {**provenance, **settings, "versions": versions}.items() if value]
