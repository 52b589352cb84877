"""The class of mbridge that each family gets, and that of a family whose weights are mapped like another's, as JSON."""

import dataclasses
import json

from dasd_megatron import backend
from dasd_megatron.config import BackendConfig

backend.select(BackendConfig())

from dasd_megatron.models.families import FAMILIES  # noqa: E402
from dasd_megatron.models.mbridge_families import bridge_class  # noqa: E402

relative = dataclasses.replace(FAMILIES["llama"], model_type="relative", mbridge_module="llama")
print(json.dumps({family.model_type: bridge_class(family).__name__ for family in (*FAMILIES.values(), relative)}))
