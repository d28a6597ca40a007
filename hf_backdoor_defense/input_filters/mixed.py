r"""Victim and PSIM as two LoRA adapters of one base, read by one mixed batch.

    [x; x]                      2 x batch rows, the first half under the victim's adapter, the second under PSIM's
    h = W_0 [x; x] + [B_v A_v x; B_p A_p x]      in every layer with an adapter; W_0 is applied once

| symbol | what it is | shape |
|---|---|---|
| x | a batch | [batch, time] |
| W_0 | a weight of the base, held once | [out, in] |
| A_v, B_v; A_p, B_p | adapters of the victim and of PSIM | [r, in], [out, r] |

The answers are those of `PSIMClassifier` on two models, at half the memory. A small batch is ready sooner, for a pass of a few
rows costs more than its arithmetic. Of many rows a pass of twice as many costs twice as much, and peft copies the rows of each
adapter in every layer (benchmarks/filters.py, `psim_one_batch`). So above `mix_up_to` rows the two adapters take turns.
In a mixed batch which row is flagged is known when its logits are there already: they are overwritten with NaN.

peft mixes LoRA adapters, and heads that are a single linear layer. For every other pair there are two models: `PSIMClassifier`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_backdoor_defense.input_filters.serving import FilteredOutput, PSIMClassifier

if TYPE_CHECKING:
    from hf_backdoor_defense.input_filters.psim import PSIMFilter

VICTIM = "victim"
MIX_UP_TO = 8  # ours: MiniLM on a CPU, sentences; two passes are as fast from there on
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as peft names them


def share_base(psim_model: Any, victim_adapter: str | Path, *, name: str = VICTIM) -> Any:
    """Load the victim's adapter beside PSIM's, on the same base. PSIM's stays active: its filter scores as before.

    Args:
        psim_model: the filter's peft model, changed in place.
        victim_adapter: a folder that `save_pretrained` of the victim's peft model wrote.

    Returns:
        The same model, with both adapters.

    Raises:
        ValueError: no adapter there, not LoRA twice, an adapter of that name, a head that cannot be mixed, other classes.
    """
    from peft import PeftConfig, PeftModel, PeftType
    from peft.utils.other import AuxiliaryTrainingWrapper

    fallback = "use two models: PSIMClassifier(victim, psim_filter)."
    missing = [file for file in ADAPTER_FILES if not (Path(victim_adapter) / file).is_file()]
    if missing:
        raise ValueError(
            f"`{victim_adapter}` has no {' and no '.join(missing)}: only adapters in safetensors are read. Save the "
            f"victim's peft model with save_pretrained(). A victim without adapter: {fallback}"
        )
    config = PeftConfig.from_pretrained(str(victim_adapter))
    if not isinstance(psim_model, PeftModel):
        raise ValueError(f"PSIM's model must carry a LoRA adapter, got a plain {type(psim_model).__name__}; {fallback}")
    if name in psim_model.peft_config:
        raise ValueError(f"the model has an adapter {name!r} already: nothing was loaded. Choose another name.")
    kinds = {"PSIM": psim_model.active_peft_config.peft_type, "victim": config.peft_type}
    if set(kinds.values()) != {PeftType.LORA}:
        given = ", ".join(f"{who} {PeftType(kind).value}" for who, kind in kinds.items())
        raise ValueError(f"both adapters must be LORA, got {given}: peft mixes no others in one batch; {fallback}")
    mixable = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # peft's list
    for module in psim_model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module.original_module, mixable):
            raise ValueError(
                f"the head is a {type(module.original_module).__name__}: peft mixes heads of one linear layer only; {fallback}"
            )
    try:
        psim_model.load_adapter(str(victim_adapter), adapter_name=name)
    except RuntimeError as error:  # torch's, about shapes
        psim_model.delete_adapter(name)
        raise ValueError(
            f"`{victim_adapter}` does not fit PSIM's base: {str(error).splitlines()[-1].strip()}"
        ) from error
    return psim_model.eval()


class MixedClassifier(PSIMClassifier):
    """`PSIMClassifier` in one pass: same inputs, same outputs, same pipeline.

    Prefer `PSIMClassifier` where many inputs are flagged, or where the victim is no LoRA adapter of the base PSIM was fit on.

    Args:
        psim: a calibrated `PSIMFilter`, freshly loaded on the base; its model gains the victim's adapter.
        victim_adapter: the folder of the victim's LoRA adapter.
        tokenizer: the victim's, to be compared; None says that it is the same one.
        name: of the victim's adapter on the shared base.
        mix_up_to: rows that are read in one batch; more take turns, and flagged ones are then spared.

    Raises:
        Uncalibrated, ValueError: as `PSIMClassifier` and `share_base`.

    >>> import tempfile
    >>> from hf_backdoor_defense.adapters import apply_strategy
    >>> from hf_backdoor_defense.functional.thresholds import Calibration
    >>> from hf_backdoor_defense.input_filters.psim import PSIMFilter
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> base = BertForSequenceClassification(config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     victim = apply_strategy(base, "lora")
    ...     victim.save_pretrained(folder)
    ...     psim = PSIMFilter(apply_strategy(victim.unload(), "lora"), None, base_sha256="")  # in place of a fitted one
    ...     psim.calibration = Calibration(tail="upper", upper=0.0)
    ...     out = MixedClassifier(psim, folder)(torch.tensor([[1, 2, 3], [4, 5, 0]]))
    >>> out.logits.shape, out.flagged
    (torch.Size([2, 2]), tensor([False, False]))
    """

    def __init__(
        self,
        psim: "PSIMFilter",
        victim_adapter: str | Path,
        *,
        tokenizer: Any = None,
        name: str = VICTIM,
        mix_up_to: int = MIX_UP_TO,
    ) -> None:
        super().__init__(psim.model, psim, tokenizer=tokenizer)  # before the model is changed: it raises what is wrong
        (self.psim_name,) = psim.model.active_adapters
        self.name, self.mix_up_to = name, mix_up_to
        share_base(psim.model, victim_adapter, name=name)

    def train(self, mode: bool = True) -> "MixedClassifier":
        """Always evaluation mode: peft mixes adapters in inference only."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> FilteredOutput:
        """As `PSIMClassifier.forward`."""
        rows = self.shortened(input_ids, attention_mask, inputs)
        count = len(input_ids)
        if count > self.mix_up_to:
            return self.in_turn(rows)
        twice = {key: torch.cat([values, values]) for key, values in rows.items()}
        both = self.psim(**twice, adapter_names=[self.name] * count + [self.psim_name] * count).logits
        logits, psim_logits = both.chunk(2)
        score, flagged = self.judged(psim_logits)
        return FilteredOutput(logits=logits.masked_fill(flagged[:, None], torch.nan), psim_score=score, flagged=flagged)

    def answer(self, rows: dict[str, Tensor]) -> Tensor:
        """The victim's logits; PSIM's adapter is the active one before and after."""
        self.psim.set_adapter(self.name)
        try:
            return self.psim(**rows).logits
        finally:
            self.psim.set_adapter(self.psim_name)
