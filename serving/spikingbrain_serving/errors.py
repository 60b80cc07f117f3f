"""What can go wrong with one request; the engine itself stays well."""

from spikingbrain.errors import InputError


class InvalidRequest(InputError):
    """A request that cannot be served as it is; `param` names the field at fault, `code` the kind of fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class RequestFailed(RuntimeError):
    """A valid request that could not be computed to its end."""


class EngineStopped(RuntimeError):
    """The engine's thread has ended and serves nothing any more."""


class Overloaded(RuntimeError):
    """So many requests wait that one more is turned away; `retry_after`: seconds after which to try again."""

    def __init__(self, retry_after: int):
        super().__init__(f"too many requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after
