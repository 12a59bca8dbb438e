"""Reasons of failed downloads, in words."""

from __future__ import annotations

import errno
import socket
import urllib.error
from email.message import Message

import huggingface_hub.errors
import pytest

from deat_rb.utils.downloads import why_failed


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def of_httpx(name: str) -> Exception:
    """Return an exception like that of httpx, which is not always installed."""
    error: Exception = type(name, (Exception,), {"__module__": "httpx"})("[Errno -2] a long message")
    return error


UNKNOWN_NAME = socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError(UNKNOWN_NAME), "the server cannot be reached: Name or service not known"),
        (urllib.error.URLError("no host given"), "the server cannot be reached: no host given"),
        (urllib.error.HTTPError("https://a.b", 503, "busy", Message(), None), "the server answered with status 503"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
         "the server cannot be reached: Connection reset by peer"),
        (of_httpx("ConnectError"), "the server cannot be reached"),
        (of_httpx("ReadTimeout"), "the server did not answer in time"),
        (TimeoutError("timed out"), "the server did not answer in time"),
        (caused(huggingface_hub.errors.LocalEntryNotFoundError("not found in the cache"), UNKNOWN_NAME),
         "the server cannot be reached: Name or service not known"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled"), "HF_HUB_OFFLINE is set"),
        (caused(RuntimeError("broken"), OSError(errno.ENOSPC, "No space left on device")), "the disk is full"),
        (RuntimeError("File not found or corrupted.\nMore"), "File not found or corrupted."),
        (RuntimeError(), "the reason is unknown"),
    ],
)  # fmt: skip
def test_why_failed(error: Exception, reason: str) -> None:
    assert why_failed(error) == reason
