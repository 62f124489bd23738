"""What is wrong with a request, in the form that OpenAI's clients know."""

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from .logs import event

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with an HTTP status and OpenAI's error object.

    param    the field that is wrong
    code     a name that programs may test for
    headers  of the response
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`"""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(error: ValidationError) -> ApiError:
    """What pydantic found wrong, as deep inside as it can tell; what was sent is not repeated."""
    first = max(error.errors(include_url=False, include_input=False, include_context=False), key=lambda e: len(e["loc"]))
    # Names of a union's members are among the places; fields' names are identifiers.
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str"))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {where}; see docs/server.md for those that are known", where, "unknown_field")
    return ApiError(400, f"{where or 'the body'}: {first['msg']}", where or None, "invalid_value")


def fault(error: BaseException) -> ApiError:
    """An error of ours: it goes to the log, its name alone to the client."""
    event("a fault in the server", logging.ERROR, error)
    return ApiError(500, f"{type(error).__name__} in the server; see its log", code="internal_error")
