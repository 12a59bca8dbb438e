"""Reasons why a download failed, in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator

CONNECTION_PACKAGES = ("socket", "urllib", "http", "requests", "huggingface_hub")
"""Beginnings of the names of modules whose exceptions mean that a server was not reached or did not answer."""


def why_failed(error: BaseException) -> str:
    """Return why a download failed, for a sentence: without types of exceptions, addresses in memory or long texts."""
    for each in _chain(error):
        if (status := http_status(each)) is not None:
            return f"the server answered with status {status}"
    if any(type(each).__name__ == "OfflineModeIsEnabled" for each in _chain(error)):
        return "HF_HUB_OFFLINE is set"
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in _chain(error)):
        return "the disk is full"
    if any(isinstance(each, TimeoutError) or "Timeout" in type(each).__name__ for each in _chain(error)):
        return "the server did not answer in time"
    for each in _chain(error):
        if isinstance(each, ConnectionError) or type(each).__module__.startswith(CONNECTION_PACKAGES):
            reasons = [_system_reason(other) for other in _chain(error)]
            reason = next(filter(None, reversed(reasons)), "")
            return f"the server cannot be reached{f': {reason}' if reason else ''}"
    return str(error).partition("\n")[0].strip()[:200] or "the reason is unknown"


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status, 400 to 599, of an exception of urllib, requests, httpx or the Hub's client, if any."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
    return status if isinstance(status, int) and 400 <= status < 600 else None


def _system_reason(error: BaseException) -> str:
    """Return the operating system's reason, such as "Name or service not known", or an empty string."""
    reason = getattr(error, "reason", None)
    return str(getattr(error, "strerror", None) or (reason if isinstance(reason, str) else ""))[:100]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that caused it."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        reason = getattr(current, "reason", None)  # of urllib's URLError
        current = current.__cause__ or current.__context__ or (reason if isinstance(reason, BaseException) else None)
