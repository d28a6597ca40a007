"""How the benchmarks of language models call trl: float32, nothing saved, nothing logged."""

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig


def quiet_config(folder: Path, **options: Any) -> SFTConfig:
    """trl's configuration with the benchmark's own options.

    >>> quiet_config(Path("nowhere"), learning_rate=1e-3).save_strategy.value
    'no'
    """
    return SFTConfig(
        str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
