"""Recipes: a YAML file and dotted `key=value` overrides, merged into `TrainConfig` with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_fast.trainer.config import RewardConfig, RunLossConfig, TrainConfig
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.modules import load_module

_FOLLOWS_ROLLOUT = ("temperature", "max_completion_length")
"""Options of the loss that are the rollout's unless set."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML recipe and apply `key=value` overrides (dotted keys, YAML values).

    A bare name such as `demo` is a recipe that comes with grpo-fast.

    `loss.temperature` follows `rollout.temperature`, and `loss.max_completion_length` (dr_grpo) the rollout's.

    Raises:
        ConfigError: no such file, broken YAML, unknown key (with the nearest valid one), wrong type, value out of
            range, or a contradiction.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _recipe_file(Path(path))
    try:
        given = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe: {file} is not valid YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise ConfigError(f"recipe: expected {file} to hold `key: value` pairs; got a {type(given).__name__}")
    return _build(given, overrides)


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with grpo-fast, by name."""
    spec = importlib.util.find_spec("grpo_fast.recipes")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def config_from_dict(values: dict[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """As `load_config`, from nested dicts."""
    from omegaconf import OmegaConf

    return _build(OmegaConf.create(values), overrides)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested dicts that `config_from_dict` reads back, without what follows from other options."""
    values = dataclasses.asdict(config)
    values["loss"]["parameters"] = dict(config.loss.parameters)  # OmegaConf takes plain dicts only
    for name in _FOLLOWS_ROLLOUT:
        if values["loss"][name] == values["rollout"][name]:
            del values["loss"][name]
    return values


def to_yaml(config: TrainConfig) -> str:
    """The whole config as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def describe_options() -> str:
    """Every option with its default, one a line."""
    return "\n".join(f"{name} = {default}" for name, default, is_section in _options(TrainConfig) if not is_section)


def differences(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """One line for each option that is not the checkpoint's, except those about running and showing."""
    before, now = _flat(saved), _flat(as_dict(config))
    ignored = ("resume", "overwrite", "output_dir", "logging.")
    return [
        f"note: {name} is {now.get(name)!r}; the checkpoint's run had {before.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(ignored)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _options(cls: type, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """(dotted name, default as text, whether it is a section) of every option."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kinds = (hints[item.name], *typing.get_args(hints[item.name]))
        sections = [typing.cast(type, kind) for kind in kinds if dataclasses.is_dataclass(kind)]
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        text = "(required)" if default == "???" else json.dumps(default, default=str)
        yield prefix + item.name, text, bool(sections)
        for section in sections:
            yield from _options(section, f"{prefix}{item.name}.")


def _build(given: Any, overrides: Sequence[str]) -> TrainConfig:
    """Merge `given` and `overrides` into the schema and instantiate it (which validates)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    try:
        for override in overrides:
            _apply_override(given, override)
        schema = OmegaConf.structured(TrainConfig)
        # OmegaConf makes frozen dataclasses (LossConfig) read-only; the recipe is what fills them.
        OmegaConf.set_readonly(schema.loss, False)
        _check_rewards(given)
        _load_plugins(given)
        merged = OmegaConf.merge(schema, given)
        _follow_rollout(merged, given)
        return typing.cast(TrainConfig, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error.full_key or str(error.key))) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: expected a value in the recipe; got none") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'recipe'}: {_one_line(error)}") from error
    except ValueError as error:
        line = _one_line(error)
        # The loss's options are checked where recipes are not known.
        of_loss = line.partition(":")[0].partition(".")[0] in {item.name for item in dataclasses.fields(RunLossConfig)}
        raise ConfigError(f"loss.{line}" if of_loss else line) from error


def _recipe_file(file: Path) -> Path:
    if file.is_file():
        return file
    shipped = shipped_recipes()
    if str(file) in shipped:
        return shipped[str(file)]
    hint = f"; recipes that come with grpo-fast: {', '.join(shipped)}" if shipped else ""
    raise ConfigError(f"recipe: expected a YAML file; {file} does not exist{hint}")


def _apply_override(given: Any, override: str) -> None:
    from omegaconf import OmegaConf

    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override: expected key=value; got {override!r}")
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist(["value=" + override[len(key) + 1 :]]))
    value = typing.cast(dict[str, Any], parsed)["value"]
    OmegaConf.update(given, key.strip(), value, merge=True, force_add=True)


def _load_plugins(given: Any) -> None:
    """Run the recipe's own Python: losses that it registers are known from here on."""
    from omegaconf import OmegaConf

    plugins = given.get("plugins")
    if plugins is None:
        return
    if not OmegaConf.is_list(plugins) or not all(isinstance(name, str) for name in plugins):
        raise ConfigError(f"plugins: expected a list of files and modules; got {plugins}")
    try:
        for name in plugins:
            load_module(name)
    except ImportError as error:
        raise ConfigError(f"plugins: {error}") from error


def _check_rewards(given: Any) -> None:
    """Unknown keys of reward functions: OmegaConf's error does not say that it was among `rewards`."""
    rewards = given.get("rewards") or []
    known = {item.name for item in dataclasses.fields(RewardConfig)}
    for number, reward in enumerate(rewards):
        for key in reward if hasattr(reward, "keys") else ():
            if key not in known:
                raise ConfigError(_unknown_key(f"rewards[{number}].{key}"))


def _follow_rollout(merged: Any, given: Any) -> None:
    """Fill the loss's temperature and length from the rollout's; refuse two that differ."""
    set_by_user = given.get("loss") or {}
    for name in _FOLLOWS_ROLLOUT:
        if set_by_user.get(name) is None:
            merged.loss[name] = merged.rollout[name]
    if merged.loss.temperature != merged.rollout.temperature:
        raise ConfigError(
            f"loss.temperature: expected rollout.temperature ({merged.rollout.temperature}), at which the completions "
            f"are sampled; got {merged.loss.temperature} (leave it out)"
        )


def _unknown_key(key: str) -> str:
    known = [name for name, _, _ in _options(TrainConfig)]
    plain = ".".join(part for part in key.replace("[", ".").replace("]", "").split(".") if not part.isdigit())
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)
    # A right name in the wrong section is the commonest mistake, and far away in edit distance.
    leaf = plain.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    return f"{key}: no such key; did you mean {(same_leaf or near)[0]}?"


def _one_line(error: Exception) -> str:
    """The first line of an error's message (OmegaConf appends lines about its internals)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
