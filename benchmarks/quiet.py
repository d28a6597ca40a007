"""How the benchmarks of language models call trl: float32 unless asked otherwise, nothing saved, nothing logged."""

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig


def fast_bfloat16() -> bool:
    """Whether bfloat16 is the fast way here: a GPU that has it, or a CPU with AMX. On other CPUs it is many times slower.

    >>> isinstance(fast_bfloat16(), bool)
    True
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return bool(capabilities.get("amx_bf16", False))


def quiet_config(folder: Path, *, bf16: bool = False, **options: Any) -> SFTConfig:
    """trl's configuration with the benchmark's own options.

    >>> quiet_config(Path("nowhere"), learning_rate=1e-3).save_strategy.value
    'no'
    """
    return SFTConfig(
        str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
