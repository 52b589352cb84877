"""Modules that several tests share lie beside them."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("distributed", "integration", "gpu", "unit/losses"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
