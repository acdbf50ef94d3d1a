"""The one exception that sparse-prune raises for a caller's mistake."""

from __future__ import annotations


class SparsePruneError(ValueError):
    """A bad argument, file or checkpoint, told in full: which argument, what was expected, what came, what to do.

    The command line prints it as one sentence and exits with code 2.
    """

    def __init__(self, argument: str, expected: str, got: object, remedy: str) -> None:
        self.argument, self.expected, self.got, self.remedy = argument, expected, got, remedy
        super().__init__(f"{argument}: expected {expected}, got {got}; {remedy}")

    def __reduce__(self):
        return type(self), (self.argument, self.expected, self.got, self.remedy)
