"""``python -m monitoring.generate``: writes what is made from other files, so that each fact stands in one place.

A test compares what is in the repository with what this would write.
"""

from pathlib import Path

import yaml

from monitoring.dashboards import dashboards

ROOT = Path(__file__).resolve().parent.parent


def generated() -> dict[Path, str]:
    """The generated files and their text."""
    boards = {ROOT / "monitoring" / "grafana" / "dashboards" / name: text for name, text in dashboards().items()}
    return {ROOT / "k8s" / "components" / "monitoring" / "prometheus-rule.yaml": prometheus_rule(), **boards}


def prometheus_rule() -> str:
    """rules.yml, as the Prometheus operator takes it."""
    rules = yaml.safe_load((ROOT / "monitoring" / "rules.yml").read_text(encoding="utf-8"))
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "digits"},
        "spec": rules,
    }
    head = "# Made of monitoring/rules.yml by `make generated`; edit that file instead.\n"
    return head + yaml.safe_dump(manifest, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
