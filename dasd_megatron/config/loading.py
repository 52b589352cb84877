"""Reading configurations: composed from ``conf/`` and the command line, or from the file that a run has saved.

Hydra and OmegaConf are imported where they are used: most processes and half of the commands read no configuration, and
the import takes longer than the rest of ``dasd --help``.
"""

from __future__ import annotations

import difflib
import io
import re
from pathlib import Path
from typing import Any, cast

from dasd_megatron.config.checks import check_loggers, check_paths, validate
from dasd_megatron.config.fields import walk_fields
from dasd_megatron.config.schema import Config, known_fields
from dasd_megatron.errors import ConfigError, first_line
from dasd_megatron.files import atomic_file
from dasd_megatron.reading import (
    YAML_FILE_BYTES,
    MalformedError,
    UnreadableError,
    check_shape,
    check_yaml,
    read_text,
)

_MAPPING = re.compile(
    "|".join(f"{re.escape(name)}[.=]" for name, field in walk_fields(Config) if str(field.type).startswith("dict["))
)
"""Beginning of an override of a field that is a mapping, or of an entry in it."""


def load_config(overrides: list[str], config_dir: str | Path | None = None, *, needs_files: bool = True) -> Config:
    """Compose ``conf/config.yaml`` with Hydra overrides (``experiment=quickstart optimizer.lr=1e-4``), type-check and
    validate it.

    Args:
        overrides: groups and fields, each as name=value.
        config_dir: a directory of further groups. ``experiment=mine`` is then also looked for in
            ``config_dir/experiment/mine.yaml``.
        needs_files: False for a look at a configuration elsewhere than where it is to run. Its files need not exist,
            its loggers need not be installed, and its data need not be named.

    Raises:
        ConfigError: an unknown field or group, a value of the wrong type, a required field left out, a contradiction,
            or a path that does not exist.
    """
    composed = _compose(overrides, config_dir)
    if not needs_files:
        for name in ("train", "heldout"):
            if composed.data[name].path is None and composed.data[name].generator is None:
                composed.data[name].path = f"{name}.jsonl"
        return _to_config(composed)
    config = _to_config(composed)
    check_paths(config)
    check_loggers(config.logging)
    return config


def read_config(path: str | Path) -> Config:
    """Read the resolved configuration that a run saved (``<run>/config.yaml``) and validate it again.

    Its paths may be gone: what a run was resumed from, replayed or read is not looked for.

    Raises:
        UnreadableError: the file is missing or damaged. ConfigError: it holds values that no run takes.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    path, advice = Path(path), "restore it, or write another run.dir"
    text = read_text(path, advice=advice, limit=YAML_FILE_BYTES)
    try:
        check_yaml(text)
        values = OmegaConf.load(io.StringIO(text))
        check_shape(OmegaConf.to_container(values), dict)
    # OmegaConf's reader raises these beside its own: a text without a mapping is an OSError, and a number may have too
    # many digits.
    except (MalformedError, YAMLError, OSError, ValueError) as error:
        raise UnreadableError(path, f"is damaged ({first_line(error)})", advice) from error
    try:
        return _to_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def save_config(config: Config, path: str | Path) -> None:
    """Write ``config`` for :func:`read_config`; replaces ``path`` in one step."""
    from omegaconf import OmegaConf

    with atomic_file(Path(path)) as partial:
        OmegaConf.save(OmegaConf.structured(config), partial)


def _compose(overrides: list[str], config_dir: str | Path | None) -> Any:
    """Return Hydra's composed configuration, whose values are neither complete nor checked."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is not an override: write field=value, like optimizer.lr=1e-4")
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(
                f"--config-dir {config_dir} is no directory: give one that holds groups, like "
                f"{config_dir}/experiment/mine.yaml"
            )
        quoted = str(Path(config_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
        overrides = [f"hydra.searchpath=['file://{quoted}']", *overrides]
    # Hydra takes new entries of a mapping only as an addition, which its users should not have to know.
    overrides = [f"++{override}" if _MAPPING.match(override) else override for override in overrides]
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_module("dasd_megatron.conf", version_base="1.3"):
            return compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain_hydra_error(error)) from error


def _to_config(values: Any) -> Config:
    """Return the validated :class:`Config` of a composed or saved configuration."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        # Plain values first: a composed config that an override has opened with "+" would accept unknown fields.
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(values, resolve=True))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"{missing[0]} is required ({known_fields()[missing[0]]}): write {missing[0]}=..., or start from "
                "experiment=quickstart"
            )
        config = cast(Config, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        raise ConfigError(_explain_unknown_field(str(error.full_key))) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_bad_value(str(error.full_key), error)) from error
    validate(config)
    if config.rollout.engine == "embedded" and config.rollout.device == "auto":
        config.rollout.device = config.backend.kind
    return config


def _explain_unknown_field(name: str) -> str:
    close = difflib.get_close_matches(name, known_fields(), n=1, cutoff=0.5)
    return f"{name} is not a field of the configuration" + (
        f"; did you mean {close[0]}?" if close else "; `dasd train --help` lists them"
    )


def _explain_bad_value(name: str, error: BaseException) -> str:
    """Return one line about a value that the field ``name`` does not take."""
    fields = [field.removeprefix(f"{name}.") for field in known_fields() if field.startswith(f"{name}.")]
    if fields and "Invalid type assigned" in str(error):
        return f"{name} is a section and takes no value: write {name}.FIELD=..., FIELD being {', '.join(fields)}"
    return f"{name}: {first_line(error)}"


def _explain_hydra_error(error: Exception) -> str:
    """Return one line about the override that Hydra refused."""
    text = str(error)
    override = re.fullmatch(r"Error merging override (\S+?)=.*", text, re.DOTALL)
    if override and error.__cause__ is not None:
        return _explain_bad_value(override.group(1).lstrip("+"), error.__cause__)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        return _explain_unknown_field(unknown.group(1))
    group = re.search(
        r"Could not find '([^']+)/([^'/]+)'.*?Available options in '[^']*':\n((?:\t[^\n]*\n)*)", text, re.DOTALL
    )
    if group:
        options = ", ".join(group.group(3).split())
        return f"{group.group(1)}={group.group(2)} does not exist; choose one of: {options}"
    return " ".join(text.split())
