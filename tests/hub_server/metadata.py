"""What the Hub refuses in a card: `README.md` = "---", YAML, "---", text.

    check_card(README.md) = (errors, warnings)       errors: one sentence per field that breaks a rule, answered with 400
                                                     warnings: 200

The rules are an independent reading of the Hub's documented metadata, not its code: they know the fields that this project writes
and let the rest pass. Stricter than the Hub may be: "other" without `license_name`, the lengths.
"""

import re
from typing import Any

import yaml

README_BYTES = 1 << 20
"""Assumed: the Hub answers 413 to large cards and documents no number; 1 MiB is what its front end is commonly set to."""

TEXT_LENGTH = 512
"""Assumed: the longest string of a field."""

LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
    lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
    ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
RELATIONS = ("adapter", "finetune", "merge", "quantized")

_BLOCK = re.compile(r"\A\s*---[\r\n]+(.*?)(?:[\r\n]+)?^---(?:\r\n|\n|\Z)", re.DOTALL | re.MULTILINE)
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"duplicated mapping key {twice[0]!r}")
        return super().construct_mapping(node, deep)


def metadata(text: str) -> Any:
    """The YAML of a card; {} where there is none. Raises yaml.YAMLError."""
    block = _BLOCK.match(text)
    return (yaml.load(block[1], _Loader) if block else None) or {}  # noqa: S506 - a SafeLoader


def check_card(text: str, repo_type: str = "model") -> tuple[list[str], list[str]]:
    """Errors and warnings about `README.md`.

    Example:
        >>> check_card("---\\nlicense: beer\\n---\\ntext")[0]
        ['"license" must be one of the licenses of the Hub, got beer']
    """
    try:
        card = metadata(text)
    except yaml.YAMLError as error:
        return [f"YAML metadata of README.md cannot be read: {error}"], []
    if not isinstance(card, dict):
        return ["YAML metadata of README.md must be an object"], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [*_too_long(card, ""), *_licenses(card), *_names(card), *_lists(card)]
    if repo_type == "model":
        errors += _model_index(card.get("model-index"))
    return errors, []


def _too_long(value: Any, path: str) -> list[str]:
    """Strings beyond what a field may hold, anywhere."""
    if isinstance(value, dict):
        return [found for key, below in value.items() for found in _too_long(below, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [found for i, below in enumerate(value) for found in _too_long(below, f"{path}[{i}]")]
    long = isinstance(value, str) and len(value) > TEXT_LENGTH
    return [f'"{path}" length must be less than or equal to {TEXT_LENGTH} characters long'] if long else []


def _licenses(card: dict[str, Any]) -> list[str]:
    found = card.get("license")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    errors = [
        f'"license" must be one of the licenses of the Hub, got {name}'
        for name in listed
        if not isinstance(name, str) or name not in LICENSES
    ]
    if "license" in card and not listed:
        errors.append('"license" is not allowed to be empty')
    if "other" in listed and not isinstance(card.get("license_name"), str):
        errors.append('"license_name" is required where "license" is other')
    return errors


def _names(card: dict[str, Any]) -> list[str]:
    """`base_model`, `datasets`, `base_model_relation`, single words."""
    errors = []
    for key, what in (("base_model", "model"), ("datasets", "dataset")):
        found = card.get(key)
        for i, name in enumerate(found if isinstance(found, list) else [] if found is None else [found]):
            where = f"{key}[{i}]" if isinstance(found, list) else key
            if not isinstance(name, str):
                errors.append(f'"{where}" must be a string')
            elif not _ID.fullmatch(name):
                errors.append(
                    f'"{where}" with value "{name}" is not valid. Use a {what} id from https://hf.co/{what}s.'
                )
    if card.get("base_model_relation") not in (None, *RELATIONS):
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "thumbnail"):
        if key in card and not isinstance(card[key], str):
            errors.append(f'"{key}" must be a string')
    return errors


def _lists(card: dict[str, Any]) -> list[str]:
    """`tags`, `language`, `metrics`."""
    errors = []
    for key in ("tags", "language", "metrics"):
        found = card.get(key)
        if found is None:
            continue
        if isinstance(found, str) and key == "language":
            found = [found]
        if not isinstance(found, list):
            errors.append(f'"{key}" must be an array')
            continue
        for i, word in enumerate(found):
            if not isinstance(word, str):
                errors.append(f'"{key}[{i}]" must be a string')
            elif key == "language" and not _LANGUAGE.fullmatch(word):
                errors.append(f'"language[{i}]" must be an ISO 639-1, 639-2 or 639-3 code, got {word}')
    return errors


def _model_index(index: Any) -> list[str]:
    """Every model has a name and results; every result a task, a dataset and metrics."""
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict):
            errors.append(f'"{where}" must be of type object')
            continue
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append(f'"{where}.name" is required')
        results = model.get("results")
        if not isinstance(results, list):
            errors.append(f'"{where}.results" is required')
            continue
        for j, result in enumerate(results):
            errors += _result(result, f"{where}.results[{j}]")
    return errors


def _result(result: Any, where: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{where}" must be of type object']
    errors = []
    for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
        found = result.get(part)
        for key in keys:
            if not isinstance(found, dict) or not isinstance(found.get(key), str) or not found[key]:
                errors.append(f'"{where}.{part}.{key}" is required')
    metrics = result.get("metrics")
    if not isinstance(metrics, list):
        return [*errors, f'"{where}.metrics" is required']
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            errors.append(f'"{where}.metrics[{k}].type" is required')
        if not isinstance(metric, dict) or metric.get("value") is None:
            errors.append(f'"{where}.metrics[{k}].value" is required')
    return errors
