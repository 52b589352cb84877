"""Hook of ``mkdocs build``: the README as the first page, the reference of the configuration from its schema, and links
to other files of the repository."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from dasd_megatron.config import Config, field_limits

_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    queue = [root / "README.md", *(root / "docs" / file.src_uri for file in files if file.src_uri.endswith(".md"))]
    seen = set(queue)

    def uri(path: Path) -> str:
        if path == root / "README.md":
            return "index.md"
        return str(
            path.relative_to(root / "docs")
            if path.is_relative_to(root / "docs")
            else Path("repository") / path.relative_to(root)
        )

    # Grows while pages name further files.
    for path in queue:

        def link(match: re.Match, path: Path = path) -> str:
            title, target, anchor = match.group(1), match.group(2), match.group(3) or ""
            other = (path.parent / target).resolve()
            if other.is_dir():
                return f"`{title}`"
            if not other.is_file():
                # An address, a page that is made here, or a mistake to complain about.
                return match.group(0)
            if other not in seen:
                seen.add(other)
                queue.append(other)
            return f"[{title}]({os.path.relpath(uri(other), os.path.dirname(uri(path)) or '.')}{anchor})"

        old = files.get_file_from_path(uri(path))
        if path.suffix == ".md":
            if old is not None:
                files.remove(old)
            files.append(File.generated(config, uri(path), content=_LINK.sub(link, path.read_text())))
        elif old is None:
            files.append(File.generated(config, uri(path), abs_src_path=str(path)))
    files.append(File.generated(config, "configuration.md", content=configuration_reference()))
    return files


def configuration_reference() -> str:
    """Every field of the schema by section, with its type, default, limits and documentation."""
    lines = [
        "# Configuration", "",
        "Every field, as `dasd train FIELD=VALUE ...` takes it. Groups like `model=qwen3_8b` or "
        "`experiment=dasd_32b` set many at once;",
        "`dasd train --help` prints this list too. A default of `required` has to be given, by an experiment or on "
        "the command line.", "",
    ]  # fmt: skip
    limits = field_limits()

    def section(schema: type, prefix: str) -> None:
        inner = []
        rows = []
        for field in dataclasses.fields(schema):
            if dataclasses.is_dataclass(field.default_factory):
                inner.append(field)
                continue
            name = prefix + field.name
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            rows.append(
                f"| `{name}` | {_escape(field.type)} | {_default(default)} | {limits.get(name, '')} | "
                f"{_escape(field.metadata['doc'])} |"
            )
        if rows:
            lines.extend(
                [
                    f"## {prefix.rstrip('.') or 'top level'}",
                    "",
                    "| field | type | default | limits | |",
                    "|---|---|---|---|---|",
                    *rows,
                    "",
                ]
            )
        for field in inner:
            section(field.default_factory, f"{prefix}{field.name}.")

    section(Config, "")
    return "\n".join(lines)


def _default(value: Any) -> str:
    return "required" if value == "???" else f"`{'null' if value is None else value}`"


def _escape(text: str) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;")
