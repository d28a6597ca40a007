"""What a model was defended with, read from `defense.json` and `defense.safetensors` beside it: in a folder, or on the Hub.

Nothing else of a repository is downloaded. Weights are loaded as every model's: `AutoModel….from_pretrained("ORG/NAME")`.
"""

from pathlib import Path

from safetensors import SafetensorError

from hf_backdoor_defense.fetching import fetched
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.registry import objective_class
from hf_backdoor_defense.trainers.state import CONFIG_NAME, TENSORS_NAME, _read, load_objective


def load_defenses(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> list[Objective]:
    """The objectives that hosted a model's training, with their fields and state, in their order; [] for plain training.
    `load_objective` reads one whose class is known.

    Args:
        source: a model's folder, or ORG/NAME. revision: of the repository: branch, tag or commit.
        token: None: the one of HF_TOKEN or of the login.

    Raises:
        ValueError: no such repository, no `defense.json`, a method that this package does not have, fields or a state that the
            method refuses.

    Example:
        >>> import tempfile
        >>> from hf_backdoor_defense.defenses.dece import DeCE
        >>> from hf_backdoor_defense.trainers.state import save_objectives
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_objectives([DeCE(alpha_base=0.9)], folder)
        ...     [found.alpha_base for found in load_defenses(folder)]
        [0.9]
    """
    folder = fetched(source, [CONFIG_NAME, TENSORS_NAME], revision=revision, token=token)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"`{source}` must hold {CONFIG_NAME}, and does not: it was not trained by a defended Trainer, or published without "
            "it. Check the name."
        )
    try:
        names = [str(entry["config"]["name"]) for entry in _read(folder)[0]]
        return [load_objective(objective_class(name), folder) for name in names]
    except (
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OSError,
        SafetensorError,
    ) as error:  # a stranger's file may hold anything
        raise ValueError(
            f"`{source}` must hold {CONFIG_NAME} and {TENSORS_NAME} as this package writes them, got something else "
            f"({type(error).__name__}: {error}). Get both files anew."
        ) from error
