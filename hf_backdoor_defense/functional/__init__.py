"""Pure tensor mathematics: no model, no Trainer, no files, no random state."""
