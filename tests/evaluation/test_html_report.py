"""The page: it is complete by itself, whatever names are in it, and its pictures are of what was evaluated."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_documents import Document, read
from PIL import Image
from torch import Tensor, nn
from training_problems import Snapshot, images_and_labels, used

from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.html_report import predictions_of, render_page
from deat_rb.evaluation.report import AttackResult, Check, CurvePoint, Report
from deat_rb.utils.errors import DeatError

EPS = 0.25
NASTY = "</title><script>alert('x')</script><img src=x onerror=alert(1)>&\"'"


def write_page(report: Report, path: Path, **content: Any) -> Path:
    path.write_bytes(render_page(report, **content))
    return path


def example_report(**fields: Any) -> tuple[Report, Tensor, Tensor, dict[str, Tensor]]:
    """Six images of three classes, of which fgsm misleads two and pgd a third; image 5 is misclassified clean."""
    images = torch.linspace(0.3, 0.6, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4).clone()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    predictions = {
        "natural": torch.tensor([0, 1, 2, 0, 1, 0]),
        "fgsm": torch.tensor([2, 1, 2, 2, 1, 0]),
        "pgd": torch.tensor([0, 2, 2, 2, 1, 0]),
    }
    verdicts = {name: predicted == labels for name, predicted in predictions.items()}
    results = [AttackResult.of(name, correct, seconds=1.5, forwards=1234, backwards=7, notes=("a note",))
               for name, correct in verdicts.items()]  # fmt: skip
    known: dict[str, Any] = {"eps": EPS, "num_classes": 3, "seed": 7, "batch_size": 4, "device": "cpu",
                             "versions": {"torch": "9.9"}}  # fmt: skip
    report = Report.of(results, verdicts, **{**known, **fields})
    report._adversarial.update({"fgsm": images + EPS, "pgd": images - EPS / 2})
    return report, images, labels, predictions


def page(path: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), **fields: Any) -> Document:
    report, images, labels, predictions = example_report(**fields)
    written = write_page(report, path / "report.html", images=images, labels=labels, classes=classes,
                         predictions=predictions)  # fmt: skip
    assert written == path / "report.html"
    return read(written)


def picture(source: str | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    assert source is not None
    head, data = source.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_render_page_shows_accuracies(tmp_path: Path) -> None:
    text = page(tmp_path).spaced
    assert "natural 83.33 % 43.65 to 96.99 5 / 6 1,234 7 1.5" in text
    assert "fgsm 50.00 % 18.76 to 81.24 3 / 6" in text
    assert "worst case 33.33 %" in text
    assert "6 images, Linf at eps 0.25" in text
    assert "pgd: a note" in text


def test_render_page_sorts_classes_by_robustness(tmp_path: Path) -> None:
    text = page(tmp_path).spaced
    # ant: 2 of 2 clean, none robust; bee: 1 of 2 robust; cat: one is misclassified clean and one is robust.
    assert "ant 100.00 % 0.00 % 2 bee 100.00 % 50.00 % 2 cat 50.00 % 50.00 % 2" in text
    assert "(balanced accuracy): clean 83.33 %, worst case 33.33 %." in text


def test_render_page_balanced_accuracy_weighs_classes_equally(tmp_path: Path) -> None:
    images, labels = torch.full((5, 3, 4, 4), 0.5), torch.tensor([0, 0, 0, 0, 1])
    correct = {
        "natural": torch.tensor([True, True, True, True, False]),
        "fgsm": torch.tensor([True, False] * 2 + [False]),
    }
    results = [AttackResult.of(name, each, seconds=1.0, forwards=1, backwards=1) for name, each in correct.items()]
    report = Report.of(results, correct, eps=0.1, num_classes=2, seed=0, batch_size=4, device="cpu", versions={})
    write_page(report, tmp_path / "a.html", images=images, labels=labels, classes=("a", "b"))
    # Of a 4 of 4 and 2 of 4, of b none: the averages are 50 and 25 %.
    assert "clean 50.00 %, worst case 25.00 %." in read(tmp_path / "a.html").spaced


def test_render_page_counts_confusions_under_the_first_successful_attack(tmp_path: Path) -> None:
    text = page(tmp_path).spaced
    assert (
        "true class predicted count under attack % of class count on clean images "
        "ant cat 2 100.00 % 0 bee cat 1 50.00 % 0 cat ant 1 50.00 % 1" in text
    )


@pytest.mark.parametrize("kept", [("natural",), ("natural", "fgsm")])
def test_render_page_counts_no_confusions_if_images_were_not_kept(tmp_path: Path, kept: tuple[str, ...]) -> None:
    """What clean images, or some attacks only, are mistaken for is not what it is under the first successful attack."""
    report, images, labels, predictions = example_report()
    known = {name: predictions[name] for name in kept}
    write_page(report, tmp_path / "a.html", images=images, labels=labels, classes=(), predictions=known)
    assert "under attack % of class" not in read(tmp_path / "a.html").spaced


def test_render_page_shows_example_images(tmp_path: Path) -> None:
    document = page(tmp_path)
    pictures = [picture(attributes["src"]) for attributes in document.all("img")]
    assert len(pictures) == 3 * 5, "three are misclassified, two are robust"
    first = [np.unique(each).tolist() for each in pictures[:3]]
    # Image 0 is 0.3; fgsm added eps = 0.25: amplified the perturbation is white.
    assert first == [[76], [255], [140]]
    assert "ant : predicted ant, under attack cat (fgsm, image 0)" in document.spaced
    # Image 1 is 0.36, and pgd took eps / 2 away: amplified that is half of the way from grey to black.
    assert [np.unique(each).tolist() for each in pictures[3:6]] == [[92], [64], [60]]
    assert "bee : predicted bee, under attack cat (pgd, image 1)" in document.spaced
    # Image 2 is robust; the strongest attack's attempt is shown.
    assert [np.unique(each).tolist() for each in pictures[-3:]] == [[107], [255], [171]]


def test_render_page_without_predictions(tmp_path: Path) -> None:
    report, images, labels, _ = example_report()
    write_page(report, tmp_path / "a.html", images=images, labels=labels, classes=())
    document = read(tmp_path / "a.html")
    assert "0 : misclassified (fgsm, image 0)" in document.spaced
    assert "Most frequent confusions" not in document.spaced


def test_render_page_of_a_loaded_report_has_no_examples(tmp_path: Path) -> None:
    report, images, labels, _ = example_report()
    loaded = Report.load(report.save(tmp_path))
    write_page(loaded, tmp_path / "a.html", images=images, labels=labels, classes=("a", "b", "c"))
    document = read(tmp_path / "a.html")
    assert document.all("img") == []
    assert "the adversarial images were not kept" in document.spaced
    assert "Accuracy per class" in document.spaced


def test_render_page_of_natural_accuracy_only(tmp_path: Path) -> None:
    images, labels = images_and_labels(4)
    report = evaluate(used(), images, labels, attacks="natural", eps=0.1)
    write_page(report, tmp_path / "a.html", images=images, labels=labels, classes=())
    assert "without an attack" in read(tmp_path / "a.html").spaced


def test_render_page_shows_failed_checks_first(tmp_path: Path) -> None:
    checks = (
        Check(name="fine", status="pass", figure=0.0, sentence="All is well."),
        Check(name="so so", status="warn", figure=1.0, sentence="It is not quite so."),
        Check(name="bad", status="fail", figure=None, sentence="It is bad."),
        Check(name="skipped", status="pass", figure=2.0, sentence="Two were not made."),
    )
    text = page(tmp_path, checks=checks).spaced
    assert "1 of 3 1 fail, 1 warn, 2 skipped" in text
    assert "✕ fail bad It is bad. ! warn so so It is not quite so. 1 check without warnings" in text
    assert "✓ pass fine All is well." in text


def test_render_page_draws_a_sweep(tmp_path: Path) -> None:
    curve = tuple(
        CurvePoint(eps=eps, n_correct={}, accuracy={"natural": 1.0, "fgsm": a, "pgd": b}, worst_case=b)
        for eps, a, b in ((0.0, 1.0, 1.0), (0.1, 0.75, 0.5), (0.2, 0.5, 0.0))
    )
    lines = [attributes["points"] for attributes in page(tmp_path, curve=curve).all("polyline")]
    # 576 x 240 from (52, 252), where accuracy is 0 at eps = 0.
    assert lines == [
        "52.0,12.0 340.0,72.0 628.0,132.0",
        "52.0,12.0 340.0,132.0 628.0,252.0",
        "52.0,12.0 340.0,132.0 628.0,252.0",
    ]
    assert page(tmp_path, curve=()).all("polyline") == []


def test_render_page_says_which_attacks_are_not_drawn(tmp_path: Path) -> None:
    accuracy = {f"pgd-{steps}": 0.5 for steps in range(1, 9)}
    curve = tuple(CurvePoint(eps=eps, n_correct={}, accuracy=accuracy, worst_case=0.5) for eps in (0.0, 0.1))
    document = page(tmp_path, curve=curve)
    assert len(document.all("polyline")) == 7, "six and the worst case"
    assert "2 more attacks are not drawn; the worst case covers all of them." in document.spaced


def test_render_page_has_no_scripts_or_external_resources(tmp_path: Path) -> None:
    document = page(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not {tag for tag, _ in document.tags} & {"script", "link", "iframe", "object", "embed", "a", "form", "base"}
    for _, attributes in document.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert re.findall(r"https?:|//|url\(|@import", re.sub(r"base64,[\w+/=]+", "", html)) == []
    policy = next(each for each in document.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_render_page_escapes_names(tmp_path: Path) -> None:
    checks = (Check(name=NASTY, status="warn", figure=0.0, sentence=NASTY),)
    document = page(
        tmp_path,
        classes=(NASTY, NASTY, NASTY),
        checks=checks,
        notes=(NASTY,),
        device=NASTY,
        versions={NASTY: NASTY},
        provenance={"run": NASTY, "dataset": NASTY, "note": NASTY, NASTY: NASTY},
    )
    assert document.all("script") == []
    assert all((each["src"] or "").startswith("data:image/png;base64,") for each in document.all("img"))
    assert document.spaced.count(NASTY) > 20


def test_render_page_has_dark_mobile_and_print_styles(tmp_path: Path) -> None:
    document = page(tmp_path)
    html = (tmp_path / "report.html").read_text()
    for query in ("prefers-color-scheme: dark", "max-width: 34rem", "media print"):
        assert query in html
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in document.all("meta")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_render_page_shows_images_of_any_number_of_channels(channels: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 400 * 8, 2))
    images = torch.rand(3, channels, 400, 8)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    report = evaluate(model, images, labels, attacks="fgsm", eps=0.5, norm="L2")
    write_page(report, tmp_path / "a.html", images=images, labels=labels, classes=("a", "b"))
    pictures = [picture(each["src"]) for each in read(tmp_path / "a.html").all("img")]
    assert {each.shape for each in pictures} == {(160, 3, 3)}, "a large one is made smaller"


def test_predictions_of_leaves_the_model_unchanged() -> None:
    model = used()
    images, labels = images_and_labels(8)
    report = evaluate(model, images, labels, attacks="fgsm,pgd-2", eps=0.2)
    before = Snapshot(model)
    found = predictions_of(model, report, images, batch_size=3)
    assert before.differences() == []
    for name, correct in report.verdicts.items():
        assert torch.equal(found[name] == labels, correct)


def test_render_page_refuses_other_images(tmp_path: Path) -> None:
    report, images, labels, _ = example_report()
    with pytest.raises(DeatError, match="the report covers 6 examples, not 5 images with 5 labels"):
        write_page(report, tmp_path / "a.html", images=images[:5], labels=labels[:5], classes=())


def test_render_page_shows_the_training() -> None:
    report, images, labels, _ = example_report()
    given: dict[str, Any] = {"images": images, "labels": labels, "classes": ("ant", "bee", "cat")}
    plain = Document(render_page(report, **given).decode())
    assert "Training" not in plain.words
    shown = Document(render_page(report, **given, training={"backward passes": "1,234"}, curves=b"PNG").decode())
    assert "backward passes 1,234" in shown.spaced
    (curves,) = (each for each in shown.all("img") if each.get("class") == "curves")
    assert curves["src"] == "data:image/png;base64," + base64.b64encode(b"PNG").decode()
