"""Flags, configuration files and presets, one set of keys for all three: flags win over the file, the file over the preset."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

PREFIX = "--defense."


def parse(
    types: Sequence[type], argv: list[str], presets: Mapping[str, Mapping[str, Any]], prog: str
) -> tuple[tuple[Any, ...], list[dict[str, Any]]]:
    """The dataclasses filled in, and the defenses as `{"name": …, fields…}`.

    `--defense NAME…` (or `defense:` in the file: a name, a mapping with `name`, or a list of either) says which;
    `--defense.FIELD VALUE` sets a field where one is given, `--defense.NAME.FIELD VALUE` where there are several.

    Raises:
        ValueError: unknown key (with a suggestion), unreadable file, a field for a defense that is not given.
    """
    from trl import TrlParser

    argv, dotted = _take_dotted(list(argv))
    argv, config_path = _take(argv, "--config")
    argv, preset = _take(argv, "--preset")
    argv, named = _take_many(argv, "--defense")
    defaults: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets:
            raise ValueError(f"There is no preset `{preset}`. Presets: {', '.join(filter(None, presets))}.")
        defaults.update(presets[preset])
    if config_path is not None:
        config = _read(config_path)
        if "preset" in config:
            raise ValueError(f"`{config_path}` holds `preset`, which is a flag: --preset {config['preset']}.")
        defaults.update(config)
    defense = named if named is not None else defaults.pop("defense", [])
    defaults.pop("defense", None)
    parser = TrlParser(list(types), prog=prog, allow_abbrev=False, description=_description(presets))
    known = {action.dest for action in parser._actions}
    for key in defaults:
        if key not in known:
            raise ValueError(_unknown(key, known, f"`{config_path}`"))
    parser.set_defaults_with_config(**defaults)
    *parsed, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if rest:
        key = rest[0].removeprefix("--").partition("=")[0]
        raise ValueError(
            _unknown(key, known, "The command line") if rest[0].startswith("-") else f"What is `{rest[0]}`?"
        )
    return tuple(parsed), _specs(defense, dotted)


def given(argv: list[str], key: str) -> str | None:
    """What the command line, or else its configuration file, gives for one key: for a verb whose other keys depend on it.

    >>> given(["--seed", "1", "--attack=por"], "attack")
    'por'
    """
    _, value = _take(list(argv), f"--{key}")
    _, config = _take(list(argv), "--config")
    if value is None and config is not None:
        value = _read(config).get(key)
    return value if value is None else str(value)


def _description(presets: Mapping[str, Any]) -> str:
    return (
        f"Also: --config FILE.yaml (same keys); --preset {{{','.join(filter(None, presets))}}}; --defense NAME… with "
        "--defense.FIELD VALUE (or --defense.NAME.FIELD VALUE). Flags win over the file, the file over the preset."
    )


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"There is no configuration file `{path}`. Check the path.")
    try:
        config = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"`{path}` must hold keys and values (the names of the flags), got {type(config).__name__}.")
    return config


def _specs(defense: Any, dotted: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    items = defense if isinstance(defense, list) else [defense]
    specs = [{"name": item} if isinstance(item, str) else dict(item) for item in items]
    for key, value in dotted:
        name, _, field = key.rpartition(".")
        chosen = [spec for spec in specs if name in ("", spec.get("name"))]
        if len(chosen) != 1:
            given = ", ".join(str(spec.get("name")) for spec in specs) or "none"
            raise ValueError(
                f"`{PREFIX}{key}` does not say which defense it means (given: {given}). Write {PREFIX}NAME.{field or key} "
                "and name the defense with --defense NAME."
            )
        chosen[0][field] = value
    return specs


def _take_dotted(argv: list[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    rest, found = [], []
    while argv:
        word = argv.pop(0)
        if not word.startswith(PREFIX):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix(PREFIX).partition("=")
        if not equals:
            if not argv or argv[0].startswith("--"):
                raise ValueError(f"`{word}` needs a value, for example {word} 0.9.")
            value = argv.pop(0)
        found.append((key, yaml.safe_load(value)))
    return rest, found


def _take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    argv, values = _take_many(argv, flag)
    if values is not None and len(values) != 1:
        raise ValueError(f"`{flag}` takes one value, got {values}.")
    return argv, None if values is None else values[0]


def _take_many(argv: list[str], flag: str) -> tuple[list[str], list[str] | None]:
    rest: list[str] = []
    values: list[str] | None = None
    taking = False
    for word in argv:
        if word == flag or word.startswith(f"{flag}="):
            taking, values = word == flag, values or []
            values += [] if taking else [word.partition("=")[2]]
        elif taking and not word.startswith("--"):
            values = [*(values or []), word]
        else:
            taking = False
            rest.append(word)
    return rest, values


def _unknown(key: str, known: set[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else " See --help."
    return f"{where} holds an unknown key `{key}`.{hint}"
