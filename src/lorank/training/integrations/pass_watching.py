"""Collects the second moments of what goes through every rank in training, for methods that read them."""

from __future__ import annotations

from lorank.errors import ValidationBatchError
from lorank.lora import Gramians
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState


class PassWatching(Integration):
    """Gives the layers their :class:`~lorank.lora.Gramians` during a run, if its method reads them.

    Args:
        compiled: whether the model is compiled, or will be. Then the passes of training cannot be watched, and the
            method measures on the validation batch instead.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def on_start(self, run: RunState) -> None:
        """Raises ValidationBatchError if passes cannot be watched and there is no validation batch."""
        if not run.allocator.watches_passes:
            return
        if self._compiled:
            if run.validation_batch is None:
                raise ValidationBatchError(
                    f"{type(run.allocator).__name__} watches the passes of training, which torch.compile hides. Give "
                    "data to measure on instead: attach(…, validation_batch=batch), or train without torch.compile"
                )
            return
        run.layers.gramians = Gramians(run.layers)

    def after_resize(self, run: RunState) -> None:
        gramians = run.layers.gramians
        if gramians is not None:
            gramians.watch()  # layers may have another form now

    def on_end(self, run: RunState) -> None:
        if run.layers.gramians is not None:
            run.layers.gramians.remove()
            run.layers.gramians = None
