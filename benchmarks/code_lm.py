"""What the pretrained model of code is worth: bits per byte on held-out files of the standard library, beside a 5-gram model.

    python -m benchmarks.code_lm            # makes the model where it is not there (examples/pretrain_tiny_code_lm.py)

Reads the figures that were measured when the model was made (`code_lm.json` beside it) and keeps them as records.
"""

import json

from benchmarks.grid import RESULTS
from examples.pretrain_tiny_code_lm import FACTS, FOLDER
from examples.pretrain_tiny_code_lm import main as pretrain
from hf_backdoor_defense.reporting.results import Record, append_records, environment


def main() -> None:
    """The model, then its records."""
    if not (FOLDER / FACTS).is_file():
        pretrain([])
    facts = json.loads((FOLDER / FACTS).read_text())
    common = {
        "benchmark": "code_lm", "dataset": "standard library", "model": f"code LM, {facts['parameters'] / 1e6:.1f} M",
        "attack": "none", "defense": "undefended", "seed": facts["seed"], "env": environment() | {"pretraining": facts},
    }  # fmt: skip
    path = RESULTS / "code_lm.jsonl"
    path.unlink(missing_ok=True)
    append_records(
        path,
        [
            Record(
                metric="bits_per_byte",
                value=facts["bits_per_byte"],
                setting="model",
                n=facts["held_out_bytes"],
                **common,
            ),
            Record(
                metric="bits_per_byte",
                value=facts["bits_per_byte_5gram"],
                setting="5-gram",
                n=facts["held_out_bytes"],
                **common,
            ),
            Record(metric="seconds", value=facts["seconds"], setting="model", **common),
        ],
    )
    print(f"{path}: {facts['bits_per_byte']} bits per byte, a 5-gram model {facts['bits_per_byte_5gram']}")


if __name__ == "__main__":
    main()
