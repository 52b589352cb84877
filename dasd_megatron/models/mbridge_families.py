"""mbridge with the families that this package supports, and without the others.

``import mbridge`` runs the module of every family. Those of vision models import transformers' own models, which takes
most of the time, and a version of transformers that one of them does not know would stop a run that needs none of them.
Import mbridge through this module alone, and after the backend has prepared torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dasd_megatron.models.families import FAMILIES, Family


def _skip_other_families() -> None:
    """Put an empty ``mbridge.models`` in place, unless mbridge has been imported in whole. Its modules can still be
    imported by their names."""
    spec = importlib.util.find_spec("mbridge")
    if "mbridge" in sys.modules or spec is None or spec.origin is None:
        return
    models = ModuleType("mbridge.models")
    models.__path__ = [str(Path(spec.origin).parent / "models")]
    sys.modules[models.__name__] = models


_skip_other_families()

from mbridge.core.bridge import _MODEL_REGISTRY, Bridge  # noqa: E402


def _module_name(family: Family) -> str:
    return f"mbridge.models.{family.mbridge_module or family.model_type}"


for _family in FAMILIES.values():
    importlib.import_module(_module_name(_family))


def bridge_class(family: Family) -> type[Bridge]:
    """Return mbridge's own class for a family."""
    module = _module_name(family)
    # A module may register its class under another name than its own.
    return next(bridge for bridge in _MODEL_REGISTRY.values() if bridge.__module__ == module)
