"""Types of a leaderboard entry's fields: texts, numbers and hashes as untrusted input may have them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.pages.format import web_link
from deat_rb.leaderboard.untrusted import plain, visible
from deat_rb.utils.units import check_eps, format_fraction, parse_fraction

NO_DATE = "is not a date such as 2026-01-31"


def json_pattern(pattern: str) -> dict[str, Any]:
    """Return what a text's JSON schema says of its pattern."""
    return {"pattern": f"^({pattern})$"}


@dataclass(frozen=True)
class Matches:
    """Validator of a text by a pattern, which also stands in the JSON schema."""

    pattern: str
    problem: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), **json_pattern(self.pattern)}

    def _check(self, text: str) -> str:
        if re.fullmatch(self.pattern, text) is None:
            raise ValueError(self.problem)
        return text


def _web_link(text: str) -> str:
    if web_link(plain(text)) is None or re.search(r"[\"'<>]", text):
        raise ValueError("is not an https:// or http:// address with an ASCII host name")
    return text


def _canonical_eps(value: object) -> object:
    """Format an eps, given as a string or as the number that ``update_json`` writes, as 8/255 or as a decimal."""
    if isinstance(value, str) and re.fullmatch(r"[0-9.eE +/-]{1,20}", value, re.ASCII) is None:
        raise ValueError("is not a number or a fraction such as 8/255")
    if not isinstance(value, str | float | int):
        raise ValueError("is not a number or a fraction such as 8/255")
    return format_fraction(check_eps(parse_fraction(value), norm="L2"))  # in Linf, `Entry` also refuses eps above 1


def _in_the_calendar(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise ValueError(NO_DATE) from None
    return text


def check_size(check: Check) -> Check:
    """Return a check whose texts and value are not too large."""
    if len(check.name) > 80 or len(check.sentence) > 2000 or not abs(check.figure or 0) <= 1e300:
        raise ValueError("has a name or sentence that is too long, or a value that is not finite")
    visible(check.name)
    visible(check.sentence)
    return check


ShortText = Annotated[str, Field(max_length=80), AfterValidator(plain)]
LineText = Annotated[str, Field(max_length=400), AfterValidator(plain)]
Text = Annotated[str, Field(max_length=2000), AfterValidator(plain)]
Percent = Annotated[str, Matches(r"100(\.0{1,4})?|[0-9]{1,2}(\.[0-9]{1,4})?",
                                  "is not an accuracy in percent, such as '43.21'")]  # fmt: skip
Link = Annotated[str, Field(max_length=400), AfterValidator(_web_link)]
Eps = Annotated[str, BeforeValidator(_canonical_eps),
                Field(json_schema_extra=json_pattern(r"[0-9.]+(e[+-]?[0-9]+)?(/[0-9.]+)?"))]  # fmt: skip
Sha256 = Annotated[str, Matches("[0-9a-f]{64}", "is not a SHA-256 of 64 hexadecimal digits")]
Day = Annotated[str, AfterValidator(_in_the_calendar),
                Matches("[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", NO_DATE)]  # fmt: skip
Amount = Annotated[float, Field(ge=0, le=1e15)]
Examples = Annotated[int, Field(ge=1, le=10**9)]
Versions = Annotated[dict[ShortText, ShortText], Field(max_length=64)]
Number = Annotated[int, Field(ge=-(10**15), le=10**15)] | Annotated[float, Field(ge=-1e300, le=1e300)]
Row = Annotated[dict[Annotated[str, Field(pattern=r"^[a-z_0-9]{1,40}$")], Number | None], Field(max_length=64)]
