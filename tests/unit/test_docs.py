"""Commands, targets, scripts and fields that the documentation tells people to type exist, and the site builds without
a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dasd_megatron
from dasd_megatron.cli import COMMANDS
from dasd_megatron.config import known_fields
from dasd_megatron.observability.watch import CONTINUE
from tests.support.documented import PAGES, ROOT, commands

CONF = Path(dasd_megatron.__file__).parent / "conf"
FIELDS = known_fields()
SECTIONS = {name.split(".")[0] for name in FIELDS if "." in name}
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def words_of(page: str) -> list[list[str]]:
    """The words of every command of ours in a page, without what a shell does to them."""
    found = [shlex.split(command.text.split("|")[0].split("&&")[0]) for command in commands(page)]
    found = [[word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] for words in found]
    return [words for words in found if words[0] in ("dasd", "make", "python", "sbatch", "torchrun")]


def wrong(words: list[str]) -> str | None:
    program, *rest = words
    if program == "make":
        return next((word for word in rest if not word.startswith("-") and word not in TARGETS), None)
    if program in ("python", "sbatch"):
        script = next((word for word in rest if not word.startswith("-")), "")
        if script.endswith((".py", ".sh")) and not (ROOT / script).is_file() and "/" in script:
            return script
    if program == "dasd":
        if rest[0] not in COMMANDS:
            return rest[0]
        if rest[0] not in ("train", "evaluate", "rollout", "plan"):
            return None
    return next((word for word in rest if (name := _field(word)) and name not in FIELDS and name not in GROUPS), None)


def _field(word: str) -> str | None:
    """The name in ``name=value``, as Hydra takes it."""
    match = re.fullmatch(r"\+{0,2}~?([a-z_][\w.]*)=.*", word)
    return match and match.group(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_people_are_told_to_type_exists(page: Path) -> None:
    text = page.read_text()
    assert [(words, fault) for words in words_of(text) if (fault := wrong(words))] == []
    # Fields that are spoken of: `rollout.max_staleness`, `batch.packing=true`.
    spoken = {
        match
        for match in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text)
        if match.split(".")[0] in SECTIONS
    }
    files = {
        name
        for name in spoken
        if name.endswith((".py", ".md", ".json", ".jsonl", ".sh", ".yaml", ".pt", ".log", ".html", ".jinja"))
    }
    unknown = {
        name
        for name in spoken - files - {CONTINUE}
        if name not in FIELDS and not any(field.startswith(name + ".") for field in FIELDS)
    }
    assert unknown == set()


def test_commands_are_found_and_mistakes_noticed() -> None:
    page = "    make quickstart     # a comment\n    dasd train experiment=quickstart \\\n        run.dri=X\n"
    page += "\n```bash\nDASD_X=1 make nothing\n```\n"
    assert words_of(page) == [
        ["make", "quickstart"],
        ["dasd", "train", "experiment=quickstart", "run.dri=X"],
        ["make", "nothing"],
    ]
    assert [wrong(words) for words in words_of(page)] == [None, "run.dri=X", "nothing"]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install dasd-megatron[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "site" / "configuration" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in reference for name in FIELDS)
    assert (tmp_path / "site" / "index.html").is_file() and (tmp_path / "site" / "repository" / "examples").is_dir()
