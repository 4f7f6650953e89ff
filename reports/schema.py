"""The JSON Schema of verdict.json, generated from the types that write it.

`reports/verdict.schema.json` is the published copy; `python -m reports schema` prints what it must contain.
"""

from __future__ import annotations

from typing import Any, get_args

from harness.spec import VERDICTS
from harness.stats import Direction
from reports.verdict import SCHEMA_VERSION, Document

TITLE = f"resurgence verdict, version {SCHEMA_VERSION}"


def schema() -> dict[str, Any]:
    """The schema as JSON values."""
    from pydantic import TypeAdapter  # only who generates the schema needs it

    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:resurgence:verdict:{SCHEMA_VERSION}"}
    made = TypeAdapter(Document).json_schema(mode="serialization")
    claim = made["$defs"]["Claim"]["properties"]
    claim["verdict"]["enum"], claim["direction"]["enum"] = list(VERDICTS), list(get_args(Direction))
    claim["hits"]["additionalProperties"]["pattern"] = "^[01]*$"
    return dialect | made | {"title": TITLE}
