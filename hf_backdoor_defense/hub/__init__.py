"""Publishing a model with its evidence, and verifying one: card, push, verify, load."""
