"""`python -m placement.schema`: the JSON Schema of a plan's JSON, generated from the dataclasses of a plan."""

from __future__ import annotations

import json

from placement.export import PlanDocument


def plan_schema() -> str:
    """JSON Schema (draft 2020-12) of what `to_json` writes, indented."""
    schema = PlanDocument.model_json_schema(by_alias=True, mode="serialization")
    for definition in schema["$defs"].values():  # what reading asks for, which pydantic 2.12 leaves unsaid
        definition["additionalProperties"] = False
        definition["required"] = list(definition["properties"])
    return json.dumps(schema, indent=2)


if __name__ == "__main__":
    print(plan_schema())
