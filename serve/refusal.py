"""A request that is turned away: its status, and the sentence that says what to do instead."""

from http import HTTPStatus

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """Raised wherever a request is judged, and answered as the OpenAI API answers errors."""

    def __init__(
        self,
        message: str,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers

    def response(self) -> JSONResponse:
        error = {
            "message": str(self),
            "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
            "code": self.status.value,
            "param": self.param,
        }
        return JSONResponse({"error": error}, status_code=self.status, headers=self.headers)
