"""Manifests against schemas that refuse what they don't name."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import kubernetes_validate

from tests.k8s.manifests import Manifest

KUBERNETES = "1.33"
"""The oldest whose schemas kubernetes-validate has."""


def crd_complaints(service: Manifest, schema: dict[str, Any]) -> list[str]:
    """What a strict copy of a CRD's schema has against a manifest, after the API server's defaults."""
    filled = with_defaults(schema, service)
    validator = jsonschema.Draft202012Validator(strict(schema))
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(filled)]


def strict(schema: Any) -> Any:
    """A schema in which an object with `properties` has no others, as `kubectl apply` with strict validation has it."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: value if key in ("default", "enum") else strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        # `apiVersion`, `kind` and `metadata` of the top are named in its properties.
        found.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


def with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """`value` with the schema's defaults filled in, all the way down."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), each) for each in value]
    if not isinstance(value, dict):
        return value
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    found = {
        key: with_defaults(properties.get(key, others if isinstance(others, dict) else {}), each)
        for key, each in value.items()
    }
    for key, each in properties.items():
        if "default" in each and key not in found:
            found[key] = with_defaults(each, copy.deepcopy(each["default"]))
    return found


def core_complaint(manifest: Manifest) -> str | None:
    """What Kubernetes' own schema has against one of its kinds."""
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return None


def other_complaints(manifest: Manifest) -> list[str]:
    """What is wrong with a kind of an operator whose CRD is not at hand, by the keys that k8s/ may use of it."""
    validator = jsonschema.Draft202012Validator(OTHERS[manifest["kind"]])
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(manifest)]


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT, _PORT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1, "maximum": 65535}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_META = _object(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)


def _kind(api: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api},
        kind={"const": kind},
        metadata=_META,
        spec=spec,
    )


# Written from the kinds' public references: monitoring.coreos.com and gateway.networking.k8s.io/v1.
OTHERS = {
    "PodMonitor": _kind(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        _object(
            ("selector", "podMetricsEndpoints"),
            selector=_object(matchLabels=_TEXTS),
            podMetricsEndpoints=_list(
                _object(
                    ("port",),
                    port=_TEXT,
                    path=_TEXT,
                    interval=_DURATION,
                    authorization=_object(type=_TEXT, credentials=_object(("name", "key"), name=_TEXT, key=_TEXT)),
                )
            ),
        ),
    ),
    "PrometheusRule": _kind(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        _object(
            ("groups",),
            groups=_list(
                _object(
                    ("name", "rules"),
                    name=_TEXT,
                    interval=_DURATION,
                    rules=_list(
                        _object(
                            ("expr",),
                            alert=_TEXT,
                            record=_TEXT,
                            expr={"type": ["string", "integer"]},
                            labels=_TEXTS,
                            annotations=_TEXTS,
                            **{"for": _DURATION, "keep_firing_for": _DURATION},
                        )
                    ),
                )
            ),
        ),
    ),
    "Gateway": _kind(
        "gateway.networking.k8s.io/v1",
        "Gateway",
        _object(
            ("gatewayClassName", "listeners"),
            gatewayClassName=_TEXT,
            listeners=_list(
                _object(
                    ("name", "port", "protocol"),
                    name=_TEXT,
                    port=_PORT,
                    protocol={"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
                    hostname=_TEXT,
                    tls=_object(
                        mode={"enum": ["Terminate", "Passthrough"]},
                        certificateRefs=_list(_object(("name",), kind=_TEXT, name=_TEXT, namespace=_TEXT)),
                    ),
                    allowedRoutes=_object(namespaces=_object(**{"from": {"enum": ["Same", "All", "Selector"]}})),
                )
            ),
        ),
    ),
    "HTTPRoute": _kind(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        _object(
            ("rules",),
            parentRefs=_list(_object(("name",), name=_TEXT, sectionName=_TEXT, namespace=_TEXT)),
            hostnames=_list(_TEXT),
            rules=_list(
                _object(
                    ("backendRefs",),
                    matches=_list(
                        _object(path=_object(type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value=_TEXT))
                    ),
                    timeouts=_object(request=_DURATION, backendRequest=_DURATION),
                    backendRefs=_list(_object(("name", "port"), name=_TEXT, port=_PORT)),
                )
            ),
        ),
    ),
}
