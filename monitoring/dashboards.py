"""The Grafana dashboards as code: service, model, pipeline. ``make generated`` writes their JSON.

Every panel has a unit and says in a sentence what it shows; a test runs each query against a Prometheus that scraped
real traffic. The version variable and the annotations of releases are the same on all three.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import stat, timeseries
from grafana_foundation_sdk.builders.common import StackingConfig, VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="prometheus")
RATE = "[$__rate_interval]"
PEOPLE = 'route!~"/|/static/.*|/docs|/docs.css|/openapi.json|/healthz|/readyz|/metrics|unmatched"'
"""As in rules.yml: probes and pages are no requests in the sense of the objectives."""
OURS = 'code=~"5..|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|UNKNOWN|DATA_LOSS"'

GREEN, AMBER, RED = "green", "orange", "red"


@dataclass(frozen=True)
class Panel:
    """One panel: its queries by legend, and how it looks.

    Attributes:
        queries: legend (``{{label}}`` stands for a label) → PromQL.
        thresholds: from which value on amber, and red. Falling values for what should be high.
        kind: ``lines``, ``stack`` (of shares), or ``figure``: the last value, large.
        width: of 24.
    """

    title: str
    text: str
    unit: str
    queries: dict[str, str]
    thresholds: tuple[float, float] | None = None
    kind: str = "lines"
    width: int = 8


Rows = dict[str, Sequence[Panel]]


def quantiles(metric: str, labels: str = "", by: str = "") -> dict[str, str]:
    """The usual three of a histogram."""
    grouped = ", ".join(filter(None, ("le", by)))
    legend = f" {{{{{by}}}}}" if by else ""
    return {
        f"p{q * 100:g}{legend}": f"histogram_quantile({q}, sum by ({grouped}) (rate({metric}_bucket{{{labels}}}{RATE})))"
        for q in (0.5, 0.9, 0.99)
    }


SERVICE: Rows = {
    "Now": [
        Panel("Gateways up", "Gateways that Prometheus reaches.", units.Short, {"up": 'sum(up{job="gateway"})'},
              (1, 0.5), "figure", 4),
        Panel("Model there", "1 when the gateway has a version to ask.", units.Short,
              {"ready": "min(digits_upstream_ready)"}, (1, 0.5), "figure", 4),
        Panel("Requests", "People's requests, all protocols.", units.RequestsPerSecond,
              {"rate": f"sum(rate(digits_requests_total{{{PEOPLE}}}{RATE}))"}, None, "figure", 4),
        Panel("Our faults", "Share of requests that failed by our fault; the objective allows 0.1 %.",
              units.PercentUnit, {"share": "digits:request_errors:ratio5m"}, (0.001, 0.0144), "figure", 4),
        Panel("Slow", "Share of answers that took over 0.1 s; the objective allows 1 %.", units.PercentUnit,
              {"share": "digits:request_slow:ratio5m"}, (0.01, 0.144), "figure", 4),
        Panel("Refused", "Share of requests refused for overload.", units.PercentUnit,
              {"share": "digits:shed:ratio5m"}, (0.001, 0.01), "figure", 4),
    ],
    "Rate, errors, duration": [
        Panel("Requests by route", "Answers a second.", units.RequestsPerSecond,
              {"{{protocol}} {{route}}": f"sum by (protocol, route) (rate(digits_requests_total{RATE}))"}),
        Panel("Requests by version", "Which version answered.", units.RequestsPerSecond,
              {"version {{model_version}}":
               f'sum by (model_version) (rate(digits_requests_total{{model_version=~"$version", model_version!=""}}{RATE}))'}),
        Panel("Answers by code", "HTTP statuses and gRPC codes.", units.RequestsPerSecond,
              {"{{protocol}} {{code}}": f"sum by (protocol, code) (rate(digits_requests_total{{{PEOPLE}}}{RATE}))"}),
        Panel("Duration", "Of people's requests, from headers to answer.", units.Seconds,
              quantiles("digits_request_duration_seconds", PEOPLE), (0.1, 0.5)),
        Panel("p99 by route", "Where the slow ones are.", units.Seconds,
              {"{{protocol}} {{route}}": "digits:request_duration_seconds:p99_5m"}, (0.1, 0.5)),
        Panel("p99 by version", "Whether a new version is slower.", units.Seconds,
              {"version {{model_version}}": "histogram_quantile(0.99, sum by (le, model_version) "
               f'(rate(digits_request_duration_seconds_bucket{{model_version=~"$version", model_version!=""}}{RATE})))'},
              (0.1, 0.5)),
    ],
    "Saturation": [
        Panel("Under way", "Requests being answered.", units.Short,
              {"{{protocol}}": "sum by (protocol) (digits_requests_in_flight)"}),
        Panel("Waiting", "Images that wait to go upstream; 1,024 refuse the next.", units.Short,
              {"images": "sum(digits_queue_images)"}, (512, 1024)),
        Panel("Refusals", "By reason.", units.RequestsPerSecond,
              {"{{reason}}": f"sum by (reason) (rate(digits_shed_total{RATE}))"}),
        Panel("Processor", "Cores in use by the gateways.", units.Short,
              {"{{instance}}": f'rate(process_cpu_seconds_total{{job="gateway"}}{RATE})'}),
        Panel("Memory", "Resident, by gateway; the container ends at 512 MB.", units.BytesIEC,
              {"{{instance}}": 'process_resident_memory_bytes{job="gateway"}'}, (4e8, 5e8)),
        Panel("Decoding", "Large pictures being decoded or waiting for a thread.", units.Short,
              {"pictures": "sum(digits_decodes_in_flight)"}, (32, 64)),
    ],
    "Batching and the model server": [
        Panel("Images in a call", "How well waiting requests are put together.", units.Short,
              {"mean": "digits:batch_images:mean5m", **quantiles("digits_batch_images")}),
        Panel("Wait before the call", "Of the oldest image of each call.", units.Seconds,
              quantiles("digits_queue_wait_seconds"), (0.05, 0.1)),
        Panel("Model server's time", "Of calls that succeeded.", units.Seconds,
              quantiles("digits_upstream_duration_seconds"), (0.05, 0.1)),
        Panel("Model server's calls", "By code.", units.RequestsPerSecond,
              {"{{code}}": f"sum by (code) (rate(digits_upstream_calls_total{RATE}))"}),
        Panel("Sent again", "Calls that found no server and were repeated.", units.RequestsPerSecond,
              {"retries": f"sum(rate(digits_upstream_retries_total{RATE}))"}, (0.1, 1)),
        Panel("Breaker", "0 closed, 1 half open, 2 open: nothing goes upstream.", units.Short,
              {"{{instance}}": "digits_breaker_state"}, (1, 2)),
    ],
}  # fmt: skip

MODEL: Rows = {
    "Versions": [
        Panel("Answers by version", "Images read by each version.", units.CountsPerSecond,
              {"version {{model_version}}":
               f'sum by (model_version) (rate(digits_predictions_total{{model_version=~"$version"}}{RATE}))'}, width=12),
        Panel("Age of the version in use", "Since it first answered requests that name none.", units.Seconds,
              {"version {{model_version}}": "time() - max by (model_version) (digits_model_version_changed_timestamp_seconds)"},
              kind="figure", width=12),
    ],
    "What it answers": [
        Panel("Classes", "Share of each digit; people write all ten about equally often.", units.PercentUnit,
              {"{{digit}}": "sum by (digit) (digits:predictions:rate5m) / ignoring(digit) group_left sum(digits:predictions:rate5m)"},
              kind="stack"),
        Panel("Confidence", "Probability of the digit that was read.", units.PercentUnit,
              {legend: query for legend, query in
               quantiles("digits_prediction_confidence", 'model_version=~"$version"').items() if legend != "p99"}
              | {"p10": "histogram_quantile(0.1, sum by (le) "
                 f'(rate(digits_prediction_confidence_bucket{{model_version=~"$version"}}{RATE})))'}),
        Panel("Confidence by version", "Mean probability; a new version far from the old one is news.",
              units.PercentUnit,
              {"version {{model_version}}":
               f'sum by (model_version) (rate(digits_prediction_confidence_sum{{model_version=~"$version"}}{RATE})) / '
               f'sum by (model_version) (rate(digits_prediction_confidence_count{{model_version=~"$version"}}{RATE}))'}),
        Panel("Abstentions", "Share of images answered with less certainty than the threshold.", units.PercentUnit,
              {"version {{model_version}}":
               f'sum by (model_version) (rate(digits_unsure_total{{model_version=~"$version"}}{RATE})) / '
               f'sum by (model_version) (rate(digits_predictions_total{{model_version=~"$version"}}{RATE}))'}, (0.05, 0.1)),
        Panel("Answers by digit", "Images a second.", units.CountsPerSecond,
              {"{{digit}}": "sum by (digit) (digits:predictions:rate5m)"}, width=16),
    ],
    "What it is asked": [
        Panel("Ink", "Mean ink of an image; of MNIST's, half lie between 0.10 and 0.16.", units.PercentUnit,
              quantiles("digits_input_ink_share")),
        Panel("Width of the digit", "Of 28 pixels; a good crop fills 20 one way.", units.Pixels,
              quantiles("digits_input_box_width_pixels")),
        Panel("Height of the digit", "Of 28 pixels.", units.Pixels, quantiles("digits_input_box_height_pixels")),
        Panel("Unlike the training data", "Share of images whose ink lies outside 0.04 to 0.3, over an hour.",
              units.PercentUnit, {"share": "digits:input_unusual:ratio1h"}, (0.1, 0.2), width=12),
        Panel("Last candidate on the test images", "From the release ledger.", units.PercentUnit,
              {"{{metric}}": 'digits_candidate_metric{metric=~"accuracy|macro_f1|min_class_recall|coverage"}'}, width=12),
    ],
}  # fmt: skip

PIPELINE: Rows = {
    "Now": [
        Panel("Served version", "What requests that name none get.", units.Short,
              {"version": "max(digits_promoted_version)"}, None, "figure", 6),
        Panel("Its age", "Since it was published.", units.Seconds,
              {"age": "time() - max(digits_promoted_version_released_timestamp_seconds)"},
              (30 * 86400, 60 * 86400), "figure", 6),
        Panel("Ledger", "1 when it can be read.", units.Short, {"up": "min(digits_ledger_up)"}, (1, 0.5), "figure", 6),
        Panel("Prefect", "1 when its API answers.", units.Short, {"up": "min(digits_prefect_up)"}, (1, 0.5), "figure", 6),
    ],
    "Releases": [
        Panel("Runs by how they ended", "Of each flow's last 200.", units.Short,
              {"{{flow}} {{state}}": "sum by (flow, state) (digits_flow_runs)"}),
        Panel("Duration of a run", "The last one that ended.", units.Seconds,
              {"{{flow}}": "max by (flow) (digits_flow_last_duration_seconds)"}),
        Panel("Duration by task", "In the last run; a stage that was up to date takes no time.", units.Seconds,
              {"{{task}}": 'max by (task) (digits_task_last_duration_seconds{flow="release"})'}),
        Panel("Decisions", "In the ledger, by kind.", units.Short,
              {"{{kind}}": "sum by (kind) (digits_ledger_decisions_total)"}),
        Panel("The gate's checks", "1 passed, 0 not, for the last judged candidate.", units.Short,
              {"{{check}}": "min by (check) (digits_gate_check_passed)"}),
        Panel("Test accuracy", "Of the last judged candidate, with its 95 % interval.", units.PercentUnit,
              {"{{metric}}": 'digits_candidate_metric{metric=~"accuracy|accuracy_low|accuracy_high"}'}),
    ],
    "Disk": [
        Panel("Free", "Share of the disk that is left.", units.PercentUnit,
              {"{{folder}}": "min by (folder) (digits_disk_free_bytes / digits_disk_size_bytes)"}, (0.2, 0.1), width=12),
        Panel("Free, in bytes", "What is left.", units.BytesIEC, {"{{folder}}": "min by (folder) (digits_disk_free_bytes)"},
              width=12),
    ],
}  # fmt: skip

DASHBOARDS = {"service": ("Digits: service", SERVICE), "model": ("Digits: model", MODEL),
              "pipeline": ("Digits: pipeline", PIPELINE)}  # fmt: skip


def dashboards() -> dict[str, str]:
    """File name → JSON, as Grafana's provisioning reads it."""
    return {f"{uid}.json": _json(uid, title, rows) for uid, (title, rows) in DASHBOARDS.items()}


def _json(uid: str, title: str, rows: Rows) -> str:
    board = (
        build.Dashboard(title)
        .uid(f"digits-{uid}")
        .tags(["digits"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(_version())
        .annotation(_releases())
        .link(build.DashboardLink("Other dashboards").tags(["digits"]).as_dropdown(True).keep_time(True))
    )
    for row, panels in rows.items():
        board = board.with_row(build.Row(row))
        for panel in panels:
            board = board.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1, ensure_ascii=False).encode(board.build()) + "\n"


def _version() -> build.QueryVariable:
    return (
        build.QueryVariable("version")
        .label("Model version")
        .datasource(PROMETHEUS)
        .query('label_values(digits_requests_total{model_version!=""}, model_version)')
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _releases() -> build.AnnotationQuery:
    """A line in every panel where another version began to answer."""
    return (
        build.AnnotationQuery()
        .name("Releases")
        .datasource(PROMETHEUS)
        .enable(True)
        .icon_color("purple")
        .expr("changes(max(digits_model_version_changed_timestamp_seconds)[1m:10s]) > 0")
    )


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel:
    made = stat.Panel() if panel.kind == "figure" else _lines(stacked=panel.kind == "stack")
    made = made.title(panel.title).description(panel.text).datasource(PROMETHEUS).unit(panel.unit).span(panel.width)
    made = made.height(4 if panel.kind == "figure" else 8)
    if panel.thresholds:
        made = made.thresholds(_thresholds(*panel.thresholds))
    for number, (legend, expr) in enumerate(panel.queries.items()):
        made = made.with_target(Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + number)))
    return made


def _lines(*, stacked: bool) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .min(0)
        .show_points(VisibilityMode.NEVER)
        .fill_opacity(60 if stacked else 8)
        .legend(
            VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    return made.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A")).max(1) if stacked else made


def _thresholds(amber: float, red: float) -> build.ThresholdsConfig:
    if amber <= red:
        steps = [Threshold(None, GREEN), Threshold(amber, AMBER), Threshold(red, RED)]
    else:  # high is good
        steps = [Threshold(None, RED), Threshold(red, AMBER), Threshold(amber, GREEN)]
    return build.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
