"""The Trainer's progress bar with a title, and nothing printed between."""

from typing import Any

from transformers import ProgressCallback


class Progress(ProgressCallback):
    """The Trainer's bar without its printed logs."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Nothing: the figures are in the results."""
