"""What fails while a model is watched costs one warning, and never the training."""

from __future__ import annotations

from collections.abc import Callable

from attention_visualizer.support.errors import UserError, ran_out_of_memory, summary
from attention_visualizer.watching.lightning_package import rank_zero_warn


class Attempts:
    """Owner of what one training was warned of and has given up."""

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.given_up: set[str] = set()

    def attempt(self, kind: str, work: Callable[[], None], before_training: bool = False) -> None:
        """Do `work`; turn an error into a warning, once for each `kind` of output that is missing because of it.

        Raise UserError `before_training`, when the user can still correct it. Where memory ends, that kind of thing is
        not tried again.
        """
        if kind in self.given_up:
            return
        try:
            work()
        except Exception as error:
            if before_training and isinstance(error, UserError):
                raise
            again = "this time"
            if ran_out_of_memory(error):
                self.given_up.add(kind)
                again = "any more"
            name = f"{type(error).__name__}: " if isinstance(error, LookupError | AssertionError) else ""
            self.warn(kind, f"no {kind} {again}: {name}{summary(error)}")

    def warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            rank_zero_warn(f"AttentionLogger: {text}")
