r"""A victim behind PSIM: one answer per input, and none of the victim's for an input that was flagged.

    s_i       = PSIM's score of x_i (`psim.py`)          PSIM reads every row
    flagged_i = s_i outside the calibrated thresholds
    z_i       = victim(x_i) if not flagged_i else NaN     the victim reads the other rows only

| symbol | variable | shape |
|---|---|---|
| x | `input_ids`, `attention_mask`, … | [batch, time] |
| s | `psim_score` | [batch] float64, a logarithm of a probability |
| z | `logits` | [batch, k] |

Both read the same tokens, the first `max_length`: were the victim to read further than PSIM, a trigger behind that point would
pass unseen. NaN, because zeros would look like an answer: every comparison with NaN is false, and a stock
`pipeline("text-classification", model=PSIMClassifier(…))` shows the score `nan`. `PSIMPipeline` says it in words:

| `on_flag` | label and score of a flagged input |
|---|---|
| `"mark"` | None, None |
| `"abstain"` | "ABSTAIN", None: for code that needs a string |
| `"raise"` | `FlaggedInput`, which names the position |

Where victim and PSIM are LoRA adapters of one base, `mixed.MixedClassifier` is faster and holds the base once.
"""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, TextClassificationPipeline
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pipelines import PIPELINE_REGISTRY

from hf_backdoor_defense.adapters import room
from hf_backdoor_defense.defenses.psim import classifier_refusals
from hf_backdoor_defense.filters import Uncalibrated

if TYPE_CHECKING:
    from hf_backdoor_defense.input_filters.psim import PSIMFilter

ABSTAIN = "ABSTAIN"
ON_FLAG = ("mark", "abstain", "raise")
TASK = "psim-text-classification"


class FlaggedInput(ValueError):
    """An input was flagged, and `on_flag="raise"` was asked for. `index`: its position among the inputs."""

    def __init__(self, index: int, psim_score: float) -> None:
        self.index = index
        super().__init__(
            f"input {index} was flagged (PSIM score {psim_score:.4f}, outside the range of clean texts): it may "
            "carry a trigger, and gets no answer. Look at it, or pass on_flag='abstain' to go on."
        )


@dataclass
class FilteredOutput(SequenceClassifierOutput):
    """`logits` [batch, k], NaN where `flagged`; `psim_score` [batch] float64, as the filter gives it; `flagged` [batch] bool."""

    psim_score: Tensor | None = None
    flagged: Tensor | None = None


class PSIMClassifier(nn.Module):
    """Victim and PSIM as one module, for inference: no gradients. Takes the place of the victim in a loop or a pipeline.

    Args:
        victim: a sequence classifier, plain or with an adapter; it keeps its own weights.
        psim: a calibrated filter, as `PSIMFilter.fit` or `from_pretrained` gives it.
        tokenizer: the victim's. It must encode as PSIM's does; None says that it is the same one.

    Raises:
        Uncalibrated: the filter has no threshold.
        ValueError: a victim that is no single-label classifier, another tokenizer, no room for a text.

    >>> from hf_backdoor_defense.functional.thresholds import Calibration
    >>> from hf_backdoor_defense.input_filters.psim import PSIMFilter
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> victim, module = BertForSequenceClassification(config), BertForSequenceClassification(config)
    >>> psim = PSIMFilter(module, None, base_sha256="")  # in place of a fitted one
    >>> psim.calibration = Calibration(tail="upper", upper=-10.0)
    >>> out = PSIMClassifier(victim, psim)(torch.tensor([[1, 2, 3]]))
    >>> out.flagged, out.logits
    (tensor([True]), tensor([[nan, nan]]))
    """

    input_modalities = "text"  # the pipelines ask for it when they are printed

    def __init__(self, victim: nn.Module, psim: "PSIMFilter", *, tokenizer: Any = None) -> None:
        super().__init__()
        reasons = classifier_refusals(victim)
        if reasons:
            raise ValueError(" ".join(reasons))
        if psim.calibration is None:
            raise Uncalibrated(
                "the filter has no threshold yet: nothing could be flagged. Call calibrate(clean_texts) with held-out texts."
            )
        check_same_tokenizer(tokenizer, psim.tokenizer)
        self.victim, self.psim = victim, psim.model
        self.filter, self.tokenizer = psim, psim.tokenizer
        limits = [limit for limit in (psim.max_length, room(psim.model), room(victim)) if limit is not None]
        self.max_length = min(limits, default=None)
        """Tokens that both read, special tokens included; further ones are cut."""
        if self.max_length is not None and self.max_length < 3:
            raise ValueError(
                f"a text would have {self.max_length} tokens, with its special ones: virtual tokens leave no room. Use fewer."
            )
        self._special = torch.tensor(getattr(self.tokenizer, "all_special_ids", []))
        self.eval()

    def train(self, mode: bool = True) -> "PSIMClassifier":
        """PSIM stays in evaluation mode whatever is asked: dropout would move its scores off their thresholds."""
        super().train(mode)
        self.psim.eval()
        return self

    @property
    def config(self) -> Any:
        """The victim's: labels are its."""
        return self.victim.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the victim's weights."""
        return next(p.dtype for p in self.victim.parameters() if p.is_floating_point())

    def can_generate(self) -> bool:
        """It cannot; pipelines ask."""
        return False

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> FilteredOutput:
        """One row of answers per row of `input_ids`, in order.

        Args:
            input_ids, attention_mask and what else the tokenizer gives: [batch, time]. Without a mask every token counts.

        Raises:
            ValueError: an input that is not [batch, time] (labels, embeddings): nothing is trained here.
        """
        return self.in_turn(self.shortened(input_ids, attention_mask, inputs))

    def in_turn(self, rows: dict[str, Tensor]) -> FilteredOutput:
        """PSIM's pass, then the victim's over what was not flagged."""
        score, flagged = self.judged(self.psim(**rows).logits)
        logits = torch.full((len(score), self.config.num_labels), torch.nan, dtype=self.dtype, device=score.device)
        passed = ~flagged
        if passed.any():
            answers = self.answer({name: values[passed] for name, values in rows.items()})
            logits = logits.to(answers.dtype)  # under autocast
            logits[passed] = answers
        return FilteredOutput(logits=logits, psim_score=score, flagged=flagged)

    def answer(self, rows: dict[str, Tensor]) -> Tensor:
        """The victim's logits: [batch, k]."""
        return self.victim(**rows).logits

    def shortened(
        self, input_ids: Tensor, attention_mask: Tensor | None, inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The rows as both models read them, at most `max_length` long."""
        for name, values in inputs.items():
            if getattr(values, "shape", None) != input_ids.shape:
                raise ValueError(
                    f"`{name}` must be [batch, time] = {tuple(input_ids.shape)} as `input_ids` is, got "
                    f"{tuple(getattr(values, 'shape', ()))}: only what a tokenizer gives is read here. Leave it out."
                )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        return rows if self.max_length is None else cut_rows(rows, self.max_length, special=self._special)

    def judged(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Score [batch] float64 and flag [batch] bool from PSIM's logits [batch, k]."""
        score = self.filter.score_logits(logits.float().cpu())  # in the type and place that it was calibrated in
        flagged = self.filter.flags(score)
        return torch.from_numpy(score).to(logits.device), torch.from_numpy(flagged).to(logits.device)


class PSIMPipeline(TextClassificationPipeline):
    """`label, score, flagged, psim_score` for every input, in order. `psim_score` is a probability here, in (0, 1].

    With `top_k` the labels are a list, and what concerns the input as a whole stands beside it: `{"labels": [{"label",
    "score"}, …], "flagged", "psim_score"}`. A flagged input has no labels there, or "ABSTAIN" alone. Lists and other sized
    inputs give a list; generators and torch data sets a stream. Texts are cut at the classifier's `max_length`.

    Args:
        on_flag: "mark", "abstain" or "raise" (module docstring); also per call.
        others: as `pipeline("text-classification")` has them. The tokenizer may be left out.

    >>> PSIMPipeline(model=None, on_flag="drop")
    Traceback (most recent call last):
    ...
    ValueError: `on_flag` must be one of mark, abstain, raise, got 'drop': no input is ever dropped. Choose one of them.
    """

    _load_tokenizer = None  # transformers' way to say: optional, the classifier has one

    def __init__(self, *, model: Any, tokenizer: Any = None, on_flag: str = "mark", **kwargs: Any) -> None:
        self.on_flag = _checked(on_flag)
        if not isinstance(model, PSIMClassifier):
            raise ValueError(
                f"`model` must be a PSIMClassifier or a MixedClassifier, got {type(model).__name__}: a filter belongs to it. "
                "Wrap the victim: PSIMClassifier(victim, psim_filter)."
            )
        check_same_tokenizer(tokenizer, model.tokenizer)
        super().__init__(model=model, tokenizer=tokenizer or model.tokenizer, **kwargs)

    def check_model_type(self, supported_models: Any) -> None:
        """The classifier was checked above; the victim inside it is what the list is about."""

    def __call__(self, inputs: Any, *, on_flag: str | None = None, **kwargs: Any) -> Any:
        """One result per input. Raises FlaggedInput under `on_flag="raise"`, a stream when it comes to the input."""
        on_flag = self.on_flag if on_flag is None else _checked(on_flag)
        inputs = _listed(inputs)
        if isinstance(inputs, Sized) and not isinstance(inputs, str) and len(inputs) == 0:
            return []
        results = super().__call__(inputs, **kwargs)
        if isinstance(results, dict):
            return _answer(results, 0, on_flag)
        answers = (_answer(result, i, on_flag) for i, result in enumerate(results))
        return list(answers) if isinstance(results, list) else answers

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:
        """Tokens of one input."""
        if not isinstance(inputs, (str, dict)):
            raise ValueError(
                f"every input must be a string or {{'text': …, 'text_pair': …}}, got {inputs!r}. Check the column."
            )
        limit = {} if self.model.max_length is None else {"max_length": self.model.max_length}
        return super().preprocess(inputs, **{"truncation": True, **limit, **tokenizer_kwargs})

    def postprocess(
        self, model_outputs: Any, function_to_apply: Any = None, top_k: Any = 1, _legacy: bool = True
    ) -> dict[str, Any]:
        """The result of one input, a flagged one marked."""
        flagged = bool(model_outputs["flagged"][0])
        about = {"flagged": flagged, "psim_score": float(model_outputs["psim_score"][0].exp())}
        if flagged:
            return {"label": None, "score": None, **about} if _legacy else {"labels": [], **about}
        answer = super().postprocess(model_outputs, function_to_apply, top_k, _legacy)
        return {**answer, **about} if isinstance(answer, dict) else {"labels": answer, **about}


def register() -> str:
    """Make `pipeline("psim-text-classification", model=PSIMClassifier(…))` known to transformers; the task's name.

    >>> register()
    'psim-text-classification'
    """
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=PSIMPipeline, pt_model=AutoModelForSequenceClassification, type="text"
        )
    return TASK


def cut_rows(rows: dict[str, Tensor], limit: int, *, special: Tensor) -> dict[str, Tensor]:
    """Padded rows, on either side, with at most `limit` tokens each: what the tokenizer's own truncation would have left.

    Args:
        rows: [batch, time] each, with `input_ids` and `attention_mask`.
        special: ids of special tokens; one that closes a text is kept.

    Returns:
        [batch, min(time, limit)] each.

    >>> rows = {"input_ids": torch.tensor([[2, 7, 8, 9, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    >>> cut_rows(rows, 4, special=torch.tensor([2, 3]))["input_ids"]
    tensor([[2, 7, 8, 3]])
    """
    ids, mask = rows["input_ids"], rows["attention_mask"].bool()
    width = ids.shape[1]
    if width <= limit:
        return rows
    length = mask.sum(1)  # [batch]
    first = mask.int().argmax(1)  # of the tokens that are no padding
    last = (first + length - 1).clamp_min(0)
    closes = torch.isin(ids.gather(1, last[:, None])[:, 0], special.to(ids.device))
    # A short row padded on the left ends at the right edge.
    columns = first.clamp_max(width - limit)[:, None] + torch.arange(limit, device=ids.device)  # [batch, limit]
    columns[:, -1] = torch.where(closes & (length > limit), last, columns[:, -1])
    return {name: values.gather(1, columns) for name, values in rows.items()}


def check_same_tokenizer(given: Any, own: Any) -> None:
    """Raise ValueError unless both give the same ids; None is no tokenizer of its own."""
    if given is None or given is own:
        return
    vocabulary = own.get_vocab()
    words = sorted(vocabulary)[:: len(vocabulary) // 50 + 1]
    probe = " ".join([*words, *map(str.upper, words), "a naïve Café, 123 – x_y!"])  # case, accents, punctuation
    if given.get_vocab() != vocabulary or given(probe)["input_ids"] != own(probe)["input_ids"]:
        raise ValueError(
            f"the tokenizer given ({type(given).__name__}, {len(given)} tokens) is not PSIM's ({type(own).__name__}, {len(own)} "
            "tokens): both models read the same ids. Fit PSIM on the base that the victim was made from."
        )


def _checked(on_flag: str) -> str:
    if on_flag not in ON_FLAG:
        raise ValueError(
            f"`on_flag` must be one of {', '.join(ON_FLAG)}, got {on_flag!r}: no input is ever dropped. Choose one of them."
        )
    return on_flag


def _answer(result: dict[str, Any], index: int, on_flag: str) -> dict[str, Any]:
    if not result["flagged"] or on_flag == "mark":
        return result
    if on_flag == "raise":
        raise FlaggedInput(index, result["psim_score"])
    abstained = {"label": ABSTAIN, "score": None}
    return {**result, **({"labels": [abstained]} if "labels" in result else abstained)}


def _listed(inputs: Any) -> Any:
    """What transformers would take for *one* input although it holds several: a tuple, a column of a data set, an iterator."""
    if isinstance(inputs, (str, dict, list, Dataset, GeneratorType)) or not isinstance(inputs, Iterable):
        return inputs
    return list(inputs) if isinstance(inputs, Sized) else (item for item in inputs)
