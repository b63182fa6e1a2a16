"""The dashboards as files."""

from monitoring.dashboards import DASHBOARDS, dashboards
from tests.conftest import ROOT


def test_panels_say_what_they_show_and_in_what_unit() -> None:
    """In a sentence, under a title that is unique on its dashboard; figures that can be bad have limits."""
    for uid, (_, rows) in DASHBOARDS.items():
        panels = [panel for panels in rows.values() for panel in panels]
        titles = [panel.title for panel in panels]
        assert len(set(titles)) == len(titles), uid
        for panel in panels:
            assert panel.text.endswith("."), panel
            assert panel.unit, panel
        assert any(panel.thresholds for panel in panels), uid


def test_the_json_in_the_repository_is_what_the_code_makes() -> None:
    """Grafana reads these files; nobody edits them."""
    folder = ROOT / "monitoring" / "grafana" / "dashboards"
    assert {path.name: path.read_text() for path in folder.glob("*.json")} == dashboards()
