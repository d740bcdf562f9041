"""`python -m placement.schema`: the JSON Schema of a plan's JSON, generated from the dataclasses of a plan."""

from __future__ import annotations

import json

from placement.export import PlanDocument


def plan_schema() -> str:
    """JSON Schema (draft 2020-12) of what `to_json` writes, indented."""
    return json.dumps(PlanDocument.model_json_schema(by_alias=True, mode="serialization"), indent=2)


if __name__ == "__main__":
    print(plan_schema())
