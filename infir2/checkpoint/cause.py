"""What failed, out of the errors that DCP and others wrap around it."""

import torch.distributed.checkpoint as dcp


def reason(error: BaseException) -> str:
    """The cause of a failure in one line: the operating system's word where there is one."""
    if isinstance(error, dcp.CheckpointException):
        return reason(next(iter(error.failures.values()))[0])
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror} ({cause.filename})" if cause.filename else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
