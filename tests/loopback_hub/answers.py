"""What a request gets."""

from typing import Any, NamedTuple


class Answer(NamedTuple):
    """JSON unless the body is bytes."""

    status: int
    body: Any = b""
    headers: dict[str, str] = {}


class Refusal(Exception):
    """An answer that ends a request, in the form that huggingface_hub makes its errors of."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, named | (headers or {}))
