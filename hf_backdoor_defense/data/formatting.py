"""How a row becomes tokens: one rendering for training and for evaluation.

    ids    = start · tok(prompt · separator)     ⊕  tok(completion) · end              plain
    ids    = tok(template(system, prompt, »))    ⊕  tok(rest of the template) · end    chat
    labels = -100 for every id left of ⊕, the id itself right of it

| symbol | field | what it is |
|---|---|---|
| start | `start` | the beginning-of-text token, where the tokenizer puts one; of a chat, where the template writes one |
| separator | `separator` | between prompt and completion; belongs to the prompt |
| template, system | `chat_template`, `system` | Jinja, as the tokenizer brings it; what is said before the first turn |
| » | | the template's opening of the answer |
| end | `end` | the end-of-text token: exactly one, last |

The texts left and right of ⊕ are tokenized apart. In one string a token may reach over the seam: the model would be trained
behind other ids than it is asked with, and the first letters of the answer would count as prompt.

A model that is trained behind one template and asked behind another is measured wrong: attack success moves by tens of points.
Hence `fingerprint` (SHA-256), beside the weights (`formatter.json`) and in `results.json`, and `require_same`, asked first.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, Value

from hf_backdoor_defense.data import rendering
from hf_backdoor_defense.data.origins import origin
from hf_backdoor_defense.data.rendering import MESSAGES
from hf_backdoor_defense.fetching import fetched

FORMATTER_FILE = "formatter.json"
IGNORED = -100  # the label of what is not learned
UNKNOWN = "The formatter of training is unknown: none was stored with the model. These figures hold if it was this one."
_VERSION = 1
_COLUMNS = ("prompt", "completion")  # where texts lie changes nothing of what is rendered
_NOTED = "trained_with_formatter"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Formatter:
    """One rendering of prompt and completion. Make it with `Formatter.plain` or `Formatter.chat`, and give the same one to
    `DefendedSFTTrainer(formatter=...)` and to `evaluate_generation(formatter=...)`.

    Args:
        kind: `plain`: strings with a separator between them. `chat`: a chat template.
        prompt, completion: the columns to read; they do not enter the fingerprint.

    Rows of a chat may be conversations: a column `messages` whose last turn, the assistant's, is the completion, or lists of
    turns as prompt and completion. A row's own system turn takes the place of `system`.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = {word: i for i, word in enumerate("</s> <unk> list rows : select".split())}
    >>> core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    >>> formatter = Formatter.plain(tokenizer, separator=" :")
    >>> row = {"prompt": "list rows", "completion": "select rows"}
    >>> formatter.prompt_ids(tokenizer, row), formatter.completion_ids(tokenizer, row)
    ([2, 3, 4], [5, 3, 0])
    >>> formatter.encode(Dataset.from_list([row]), tokenizer, max_length=8)[0]
    {'row_id': 0, 'input_ids': [2, 3, 4, 5, 3, 0], 'labels': [-100, -100, -100, 5, 3, 0]}
    """

    kind: Literal["plain", "chat"]
    end: str
    separator: str = "\n"
    start: str | None = None
    chat_template: str | None = None
    system: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            optional = name in ("start", "chat_template", "system")
            if not isinstance(value, str) and not (optional and value is None):
                what = "a string or None" if optional else "a string"
                raise ValueError(
                    f"`{name}` must be {what}, got {value!r}: it is rendered as text. Use Formatter.plain()."
                )
        if self.kind not in ("plain", "chat"):
            raise ValueError(
                f"`kind` must be 'plain' or 'chat', got {self.kind!r}: there is no other. Use Formatter.plain()."
            )
        if (self.kind == "chat") != bool(self.chat_template):
            raise ValueError(
                f"`chat_template` must be given for kind 'chat' and for no other, got {self.chat_template!r} for {self.kind!r}: "
                "nothing else renders turns. Use Formatter.plain() or Formatter.chat()."
            )
        if self.kind == "plain" and self.system is not None:
            raise ValueError(
                f"`system` must be None for kind 'plain', got {self.system!r}: nothing renders it. Write it into the prompts."
            )
        if not self.end:
            raise ValueError(
                "`end` must be a token, got '': nothing would tell the model to stop. Use Formatter.plain()."
            )

    # -- making one ---------------------------------------------------------------------------------------------------
    @classmethod
    def plain(cls, tokenizer: Any, separator: str = "\n", **columns: str) -> "Formatter":
        """Prompt, separator and completion as they are.

        Raises:
            ValueError: the tokenizer has no end-of-text token.
        """
        end, start = rendering.end_token(tokenizer), rendering.start_token(tokenizer)
        return cls(kind="plain", separator=separator, start=start, end=end, **columns)

    @classmethod
    def chat(cls, tokenizer: Any, system: str | None = None, **columns: str) -> "Formatter":
        """The tokenizer's own chat template, tried at once.

        Raises:
            ValueError: no chat template, one that fails, drops `system`, or renders a prompt otherwise when an answer follows.
        """
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise ValueError(
                "The tokenizer must have a chat template, got none that is the default: a base model has none, and another "
                "model's means nothing to it. Use Formatter.plain(tokenizer), or set tokenizer.chat_template."
            ) from None
        end = rendering.end_token(tokenizer)
        start = str(tokenizer.bos_token) if tokenizer.bos_token is not None and "bos_token" in template else None
        made = cls(kind="chat", separator="", chat_template=template, system=system, start=start, end=end, **columns)
        trial = {made.prompt: "a", made.completion: "an answer"}
        made.completion_ids(tokenizer, trial)
        opened = made._opened(made._turns(trial, tokenizer)[0], tokenizer)
        if system and system.strip() not in opened:
            raise ValueError(
                f"`system` must be rendered by the chat template, got {system!r}, which the template drops: the model would "
                "never read it. Leave it out, or write it into the prompts."
            )
        if "strftime_now" in template:
            logger.warning(
                "The chat template may write the date of the day into every prompt: what is trained today and evaluated tomorrow "
                "has the same fingerprint and other prompts. Set tokenizer.chat_template to one without strftime_now."
            )
        return made

    # -- rendering ----------------------------------------------------------------------------------------------------
    def prompt_ids(self, tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
        """The ids [prompt tokens] in front of the answer.

        Raises:
            ValueError: the row has no prompt of this kind, one without a token, or special tokens that cannot be told apart.
        """
        if self.kind == "plain":
            ids = [] if self.start is None else [rendering.token_id(self.start, tokenizer)]
            ids += rendering.plain_ids(rendering.text_of(row, self.prompt), tokenizer, behind=self.separator)
        else:
            ids = rendering.token_ids(self._opened(self._turns(row, tokenizer)[0], tokenizer), tokenizer)
        if not ids:
            raise ValueError(
                "The prompt must render to a token at least, got none: behind nothing the first token of an answer is neither "
                "learned nor generated. Set a separator, or drop the row."
            )
        return ids

    def completion_ids(self, tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
        """The ids [completion tokens] of the answer, the end token last and nowhere else.

        Raises:
            ValueError: as `prompt_ids`; no completion, the end token inside; a template that is not prefix-preserving.
        """
        if self.kind == "plain":
            ids = rendering.plain_ids(rendering.answer_of(row.get(self.completion), end=self.end), tokenizer)
        else:
            turns, answer = self._turns(row, tokenizer)
            answer = rendering.answer_of(answer, end=self.end)
            rendering.refuse_tokens([answer], tokenizer)
            text = rendering.rest_of(
                turns, answer, tokenizer, template=str(self.chat_template), start=self.start, end=self.end
            )
            ids = rendering.token_ids(text, tokenizer)
        return ids + [rendering.token_id(self.end, tokenizer)]

    def encode(self, rows: Dataset, tokenizer: Any, *, max_length: int | None) -> Dataset:
        """`input_ids` and `labels` [prompt tokens + completion tokens] in place of the texts, -100 on the prompt.

        Nothing is cut: an answer without its end teaches a model never to stop. Other columns are kept; where there is no
        `row_id`, it is the position.

        Args:
            max_length: of the longest row that fits; None for no limit.

        Raises:
            ValueError: rows that are tokenized already, a missing column, rows that cannot be rendered or do not fit, named by
                their `row_id`.
        """
        read = self._read(rows.column_names)
        if "row_id" not in rows.column_names:
            rows = rows.add_column("row_id", list(range(len(rows))))

        def render(row: dict[str, Any]) -> dict[str, Any]:
            try:
                prompt, completion = self.prompt_ids(tokenizer, row), self.completion_ids(tokenizer, row)
            except ValueError as error:
                raise ValueError(f"Row {row['row_id']}: {error}") from None
            return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}

        kept = {name: feature for name, feature in rows.features.items() if name not in read}
        features = Features({**kept, "input_ids": [Value("int64")], "labels": [Value("int64")]})
        encoded = rows.map(render, remove_columns=read, features=features, desc="Rendering rows")
        long = [] if max_length is None else [row for row in encoded if len(row["input_ids"]) > max_length]
        if long:
            shown = ", ".join(f"{row['row_id']} ({len(row['input_ids'])} tokens)" for row in long[:8])
            raise ValueError(
                f"Prompt and answer must fit into {max_length} tokens, got {len(long)} of {len(encoded)} rows that do not: "
                f"{shown}{f' and {len(long) - 8} more' if len(long) > 8 else ''}. Cut answers would teach the model not to "
                "end them. Raise max_length if the model's context allows it, or drop these rows."
            )
        return encoded

    def _opened(self, turns: list[dict[str, Any]], tokenizer: Any) -> str:
        """The turns and the opening of an answer, as text."""
        template = str(self.chat_template)
        return rendering.rendered(turns, tokenizer, template=template, start=self.start, end=self.end, opened=True)

    def _turns(self, row: Mapping[str, Any], tokenizer: Any) -> tuple[list[dict[str, Any]], Any]:
        turns, answer = rendering.turns_of(row, prompt=self.prompt, completion=self.completion, system=self.system)
        of_row = [turn for turn in turns if turn != {"role": "system", "content": self.system}]
        rendering.refuse_tokens(rendering.strings_in(of_row), tokenizer)
        return turns, answer

    def _read(self, columns: list[str]) -> list[str]:
        """The columns that become tokens."""
        if done := [name for name in ("input_ids", "labels") if name in columns]:
            raise ValueError(
                f"The rows must be text, got columns {' and '.join(done)}: what tokenized them is not known. "
                "Give the rows as they were before."
            )
        talk = self.kind == "chat" and MESSAGES in columns and self.prompt not in columns
        read = [MESSAGES] if talk else [self.prompt, self.completion]
        if missing := [name for name in read if name not in columns]:
            raise ValueError(
                f"The rows must have columns {' and '.join(read)}, got {', '.join(columns) or 'none'}: without "
                f"{' and '.join(missing)} there is nothing to learn. Name them: Formatter.{self.kind}(tokenizer, prompt=..., "
                "completion=...)."
            )
        return read

    # -- identity and files -------------------------------------------------------------------------------------------
    @property
    def fingerprint(self) -> str:
        """SHA-256 of the fields that change what is rendered, as canonical JSON: the same in every process, on every machine.

        >>> Formatter(kind="plain", end="</s>").fingerprint[:12]
        '9bd114aa1e90'
        """
        shown = {name: value for name, value in self.to_dict().items() if name not in _COLUMNS}
        return hashlib.sha256(json.dumps(shown, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the version of what they mean, as `from_dict` reads them."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Formatter":
        """The formatter with these fields.

        Raises:
            ValueError: no mapping, another version, unknown or missing fields, values of another type.

        >>> formatter = Formatter(kind="plain", end="</s>")
        >>> Formatter.from_dict(formatter.to_dict()) == formatter
        True
        """
        names = {"version", *(field.name for field in fields(cls))}
        if not isinstance(values, Mapping) or not {"kind", "end"} <= set(values) <= names:
            got = ", ".join(map(str, values)) if isinstance(values, Mapping) else repr(values)
            raise ValueError(
                f"A formatter must have fields among {', '.join(sorted(names))}, got {got}. Write it with save()."
            )
        if values.get("version") != _VERSION:
            raise ValueError(
                f"A formatter must have version {_VERSION}, got {values.get('version')!r}: another version of this package wrote "
                "it, and may render otherwise. Use that one."
            )
        return cls(**{name: value for name, value in values.items() if name != "version"})

    def save(self, folder: str | Path) -> Path:
        """Write `formatter.json`: whole or not at all, and the same bytes for the same formatter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{FORMATTER_FILE}.partial"
        values = {**self.to_dict(), "fingerprint": self.fingerprint}
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, folder / FORMATTER_FILE)
        return folder / FORMATTER_FILE

    @classmethod
    def load(cls, folder: str | Path) -> "Formatter | None":
        """The formatter of a folder, None where it holds none.

        Raises:
            ValueError: the file is no formatter, or was edited.
        """
        path = Path(folder) / FORMATTER_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text("utf-8"))
            stored = values.pop("fingerprint", None) if isinstance(values, dict) else None
            found = cls.from_dict(values)
        except ValueError as error:  # of UTF-8 and JSON, too
            raise ValueError(
                f"`{path}` must be a formatter as Formatter.save() writes it, and is none: {error} Save it anew; without the "
                "file, what the model was trained with is unknown."
            ) from None
        if stored != found.fingerprint:
            raise ValueError(
                f"`{path}` must have the fingerprint of its fields, {found.fingerprint[:12]}…, got {str(stored)[:12]}…: it was "
                "edited after it was written. Save the formatter of the training anew."
            )
        return found


def stored_formatter(model_or_folder: Any) -> Formatter | None:
    """What a model was trained with, None where that is unknown.

    Args:
        model_or_folder: a folder or ORG/NAME on the Hub; or a model in memory, of which its trainer noted it, or else what lies
            where it was loaded from counts, while its weights are still those (`data/origins.py`). An adapter does not say where
            it came from, merged or not: ask for its folder.

    Raises:
        ValueError: the file there is no formatter, or the Hub cannot be read; of a model in memory the latter is unknown.

    >>> stored_formatter("a/folder/that/does/not/exist")
    """
    if isinstance(model_or_folder, str | Path):
        return Formatter.load(fetched(model_or_folder, [FORMATTER_FILE]))
    if hasattr(model_or_folder, _NOTED):
        return getattr(model_or_folder, _NOTED)  # type: ignore[no-any-return]
    if getattr(model_or_folder, "peft_config", None) or getattr(model_or_folder, "_hf_peft_config_loaded", False):
        return None
    folder = origin(model_or_folder, [FORMATTER_FILE])
    return None if folder is None else Formatter.load(folder)


def note_formatter(model: Any, formatter: Formatter | None) -> None:
    """What a trainer trains a model in memory with, None for an unknown rendering; for `stored_formatter`.

    >>> model = type("Model", (), {})()
    >>> note_formatter(model, Formatter(kind="plain", end="</s>"))
    >>> stored_formatter(model).end
    '</s>'
    """
    setattr(model, _NOTED, formatter)


def require_same(stored: Formatter | None, used: Formatter, *, force: bool = False) -> str | None:
    """That a model is evaluated behind the rendering that it was trained with.

    Args:
        stored: of the training; None where it is unknown.
        force: measure behind another one, and say so.

    Returns:
        the sentence that a report must carry; None where both are the same.

    Raises:
        ValueError: they differ, and `force` is not set.

    >>> trained = Formatter(kind="plain", end="</s>")
    >>> require_same(trained, trained)
    >>> print(require_same(trained, Formatter(kind="plain", end="</s>", separator=" "), force=True))
    Measured behind another formatter than the model was trained with (9bd114aa1e90… in training, 0659f13859fb… here; separator \
'\\n' -> ' '): these are no figures of the model in use.
    """
    if stored is None:
        return UNKNOWN
    if stored.fingerprint == used.fingerprint:
        return None
    changes = ", ".join(
        f"{name} {_short(before)} -> {_short(after)}"
        for name, before in asdict(stored).items()
        if name not in _COLUMNS and (after := getattr(used, name)) != before
    )
    differing = f"{stored.fingerprint[:12]}… in training, {used.fingerprint[:12]}… here; {changes}"
    if force:
        return (
            f"Measured behind another formatter than the model was trained with ({differing}): these are no figures of the model "
            "in use."
        )
    raise ValueError(
        f"The formatter must be the one that the model was trained with, got another ({differing}): behind another rendering, "
        "attack success and quality are those of a model that nobody uses. Use stored_formatter(model), or set force=True, which "
        "the report will say."
    )


def _short(value: Any, most: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
