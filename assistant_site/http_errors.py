"""What the servers themselves answer, before or without an application: OpenAI-style error objects."""

from __future__ import annotations

import json
from http import HTTPStatus

JSON = b"application/json"


def error_body(status: int, message: str, code: str | None) -> bytes:
    """The JSON error object {"error": {message, type, param, code}}."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def closing_answer(status: int, message: str, code: str | None, head_only: bool = False) -> bytes:
    """A whole HTTP/1.1 answer after which the connection closes; without its body for a HEAD request."""
    body = error_body(status, message, code)
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"content-type: {JSON.decode()}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode()
    return head if head_only else head + body


def bad_request() -> bytes:
    """For bytes that are no HTTP request."""
    return closing_answer(400, "The server could not read this as an HTTP request.", "bad_http_request")


def head_too_large(limit: int) -> bytes:
    """For a request line and headers of more than limit bytes."""
    return closing_answer(431, f"The request line and headers are larger than {limit} bytes.", "request_headers_too_large")


def application_failed(head_only: bool) -> bytes:
    """For an application that failed before it answered."""
    return closing_answer(500, "The server had an error while processing this request.", "internal_error", head_only)


def stopping(head_only: bool) -> bytes:
    """For a request that the end of the process cut off before it was answered."""
    return closing_answer(503, "The server is stopping; try again.", "server_stopping", head_only)
