"""`python -m deployments.metrics` prints the table of `docs/metrics.md`."""

from __future__ import annotations

from deployments.metrics.catalog import METRICS


def table() -> str:
    """All metrics as a Markdown table."""
    head = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.meaning} |" for metric in METRICS
    ]
    return "\n".join(head + rows)


if __name__ == "__main__":
    print(table())
