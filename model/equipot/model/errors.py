"""Errors a user of the model can cause and mend. Every message names the field, the value and the remedy."""

from typing import Literal

Reason = Literal["invalid_structure", "unsupported", "too_large"]


class ModelError(ValueError):
    """Something asked of a model that it cannot do; the command line prints it as one line."""

    exit_code = 2


class StructureError(ModelError):
    """One structure that cannot be computed.

    Attributes:
        field: the argument at fault, such as ``positions``.
        message: what is wrong, with the value and the limit.
        remedy: what the user can do about it.
        reason: the kind of failure, as the service reports it.
    """

    def __init__(
        self, *, field: str, message: str, remedy: str, reason: Reason = "invalid_structure"
    ) -> None:
        super().__init__(f"{field}: {message}; {remedy}")
        self.field = field
        self.message = message
        self.remedy = remedy
        self.reason: Reason = reason


class BundleError(ModelError):
    """A bundle that cannot be read or written."""
