"""`deat_rb.models.class_names`: labels of a dataset as logits of a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from deat_rb.models.class_names import MatchedClasses, match_classes, read_class_names
from deat_rb.utils.errors import DeatError

PETS = ("ant", "bee", "cat")


def match(classes: tuple[str, ...], known: tuple[str, ...], logits: int, **options: bool) -> MatchedClasses:
    return match_classes(classes, known, logits, source="net.pt", dataset="folder", **options)


@pytest.mark.parametrize(
    ("classes", "known", "expected"),
    [
        (PETS, PETS, ()),
        (("bee", "cat"), PETS, (1, 2)),
        (("ant", "bee"), PETS, ()),
        (("cat", "ant"), PETS, (2, 0)),
        (("1", "10", "2"), ("1", "2", "10"), (0, 2, 1)),
        (("bee", "a\u0308ffchen"), ("\u00e4ffchen", "bee"), (1, 0)),
    ],
)
def test_match_classes_by_name(classes: tuple[str, ...], known: tuple[str, ...], expected: tuple[int, ...]) -> None:
    matched = match(classes, known, len(known))
    assert matched.logit_of_class == expected
    assert matched.classes == known
    assert bool(matched.note) == bool(expected)


def test_match_classes_without_names_says_the_order() -> None:
    matched = match(PETS, (), 3)
    assert (matched.classes, matched.logit_of_class) == (PETS, ())
    assert matched.note.startswith("logits are assumed to be in this order of classes: ant, bee, cat; --classes FILE")


def test_match_classes_of_a_known_dataset_takes_the_first_logits() -> None:
    matched = match_classes(PETS, (), 12, source="net.pt", dataset="digits")
    assert matched.logit_of_class == ()
    assert matched.note.startswith("the first 3 of 12 logits are assumed to be in this order")


def test_match_classes_ignores_names_of_a_package_that_are_of_other_classes() -> None:
    known = ("crane", "crane", "bee")
    assert match(("bee",), known, 3, must_match=False).logit_of_class == (2,)
    assert match(("n1", "n2", "n3"), known, 3, must_match=False).logit_of_class == ()
    with pytest.raises(DeatError, match=r"^net\.pt has 2 classes 'crane': give unique names with --classes FILE$"):
        match(("crane", "bee"), known, 3, must_match=False)
    with pytest.raises(DeatError, match=r"^folder has the class 'ant', which net\.pt lacks"):
        match(PETS, known, 3, must_match=False)


@pytest.mark.parametrize(
    ("classes", "known", "logits", "message"),
    [
        (
            ("bee", "cat", "zebra"),
            PETS,
            3,
            r"^folder has the class 'zebra', which net\.pt lacks \(choose one of",
        ),
        (("bees", "cat"), PETS, 3, r"\(did you mean 'bee'\?\): rename or remove the class$"),
        (PETS, PETS, 4, r"^net\.pt has 4 logits but 3 class names"),
        (
            PETS,
            (),
            1000,
            r"^net\.pt has 1000 logits, but folder has 3 classes \(ant, bee, cat\): give .* with --classes",
        ),
        (PETS, (), 2, r"^net\.pt has 2 logits, but folder has 3 classes"),
        (PETS, ("ant", "ant", "bee"), 3, r"^net\.pt has the class 'ant' twice"),
    ],
)
def test_match_classes_refuses(classes: tuple[str, ...], known: tuple[str, ...], logits: int, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        match(classes, known, logits)


def test_match_classes_names_the_classes_of_a_known_dataset() -> None:
    digits = tuple(map(str, range(10)))
    matched = match_classes(digits, digits[::-1], 10, source="net.pt", dataset="digits")
    assert matched.logit_of_class == (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    with pytest.raises(
        DeatError, match=r"^digits has the class '0', .* \(did you .*\): name the classes as digits does$"
    ):
        match_classes(digits, [f"{digit}." for digit in digits], 10, source="net.pt", dataset="digits")


def test_read_class_names(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("\ufeffant\r\nred fox\r\nÄffchen\r\n\r\n".encode())
    assert read_class_names(tmp_path / "classes.txt") == ("ant", "red fox", "Äffchen")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"ant\n", "1 names"), (b"ant\nant\nbee", "'ant' twice"), (b"ant\n\nbee", "an empty line"), (b"", "0 names"),
     (b"\xff\xfe", "cannot be read")],
)  # fmt: skip
def test_read_class_names_refuses(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DeatError, match=problem):
        read_class_names(tmp_path / "classes.txt")
