"""The manifests, built as `kubectl apply -k` builds them: valid, fenced in, and true to the programs they start."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from monitoring.generate import generated
from serving.gateway.metrics import Metrics
from serving.gateway.schema import ROUTES
from serving.gateway.settings import Settings
from serving.model_server.flags import parse
from tests.conftest import HANG_S, ROOT, clean_environment
from tests.docs.commands import documented

OVERLAYS = ("overlays/local", "overlays/embedded", "overlays/production", "overlays/kserve", "jobs/training")
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()  # 1.30 is the first with preStop's sleep on
OPERATOR_KINDS = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
NO_SCHEMA = {*OPERATOR_KINDS, "InferenceService"}
"""Kinds of other projects: the operator's are checked against its own models, KServe's pod as the pod that it is."""

RELEASE_LABELS = {"digits/role": "release"}
"""Of the pods that Prefect's worker makes from job-template.json."""

LONG_RUNNING = {"Deployment", "StatefulSet", "InferenceService"}
TOOLS = ROOT / ".tools" / "bin"

Resource = dict[str, Any]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Resource]]:
    """Every overlay's resources, with secrets made as k8s/README.md says, from a copy of what kustomize reads."""
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl (1.27 or newer)")
    root = tmp_path_factory.mktemp("kustomize")
    for folder in ("k8s", "docker/tensorflow-serving"):
        shutil.copytree(ROOT / folder, root / folder)
    for command in documented("tests/k8s/test_manifests.py::built"):  # k8s/README.md on secrets
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = clean_environment(PATH=path, PYTHONPATH=str(ROOT))
        subprocess.run(["bash", "-euc", command.text], cwd=root, env=environment, check=True, capture_output=True)
    return {overlay: build(root / "k8s" / overlay) for overlay in OVERLAYS}


def build(folder: Path) -> list[Resource]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns of something that will be an error"
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, built: dict[str, list[Resource]]) -> list[Resource]:
    return built[request.param]


@pytest.fixture
def production(built: dict[str, list[Resource]]) -> list[Resource]:
    return built["overlays/production"]


def named(resources: list[Resource], kind: str, name: str = "") -> Resource:
    """The one resource of that kind (and name)."""
    (found,) = [r for r in resources if r["kind"] == kind and name in ("", r["metadata"]["name"])]
    return found


def pods(resources: list[Resource]) -> Iterator[tuple[Resource, Resource, dict[str, str]]]:
    """Each workload, its pod spec and its pods' labels."""
    for resource in resources:
        if "template" in resource.get("spec", {}):
            template = resource["spec"]["template"]
            yield resource, template["spec"], template["metadata"]["labels"]
        elif resource["kind"] == "InferenceService":
            yield resource, resource["spec"]["predictor"], resource["spec"]["predictor"]["labels"]


def containers(spec: Resource) -> list[Resource]:
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_resource_is_valid_to_the_letter(overlay: list[Resource], version: str) -> None:
    """Strict: an unknown field, which a cluster would drop in silence, is an error."""
    for resource in overlay:
        if resource["kind"] in NO_SCHEMA:
            continue
        kubernetes_validate.validate(resource, version, strict=True)


def test_kserves_pod_is_a_valid_pod(built: dict[str, list[Resource]]) -> None:
    """KServe publishes no schema that can be had here; what is not its own is a PodSpec, and checked as one."""
    predictor = copy.deepcopy(named(built["overlays/kserve"], "InferenceService")["spec"]["predictor"])
    for field in ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "labels"):
        del predictor[field]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": predictor}
    kubernetes_validate.validate(pod, NEWEST, strict=True)


def test_the_operators_resources_are_valid(production: list[Resource], tmp_path: Path) -> None:
    """Against the models generated from the Prometheus operator's own definitions, with no field unknown to them."""
    code = """
import json, sys
from cloudcoil.models.prometheus_operator import v1
def unknown(given, known, path):
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            if key not in known: yield f"{path}.{key}"
            else: yield from unknown(value, known[key], f"{path}.{key}")
    elif isinstance(given, list):
        for n, (a, b) in enumerate(zip(given, known, strict=True)): yield from unknown(a, b, f"{path}[{n}]")
for manifest in json.load(sys.stdin):
    model = getattr(v1, manifest["kind"]).model_validate(manifest)
    print(*unknown(manifest, model.model_dump(by_alias=True, exclude_none=True, mode="json"), manifest["kind"]))
"""
    manifests = [resource for resource in production if resource["kind"] in OPERATOR_KINDS]
    assert {manifest["kind"] for manifest in manifests} == OPERATOR_KINDS
    done = subprocess.run(
        [tool("python"), "-c", code], input=json.dumps(manifests), capture_output=True, text=True, check=False,
        timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_checkov_finds_nothing(built: dict[str, list[Resource]], tmp_path: Path) -> None:
    """Its checks for Kubernetes, less those that k8s/checkov.yaml leaves out with a reason each."""
    for overlay, resources in built.items():
        (tmp_path / f"{overlay.replace('/', '-')}.yaml").write_text(yaml.safe_dump_all(resources))
    done = subprocess.run(
        [tool("python"), tool("checkov"), "--directory", ".", "--config-file", str(ROOT / "k8s" / "checkov.yaml"),
         "--output", "json"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANG_S,
    )  # fmt: skip
    report = json.loads(done.stdout)
    failed = [f"{check['check_id']} {check['resource']}" for check in report["results"]["failed_checks"]]
    assert (done.returncode, failed, report["summary"]["parsing_errors"]) == (0, [], 0)
    assert report["summary"]["passed"] > 500
    excused = [
        excuse
        for resources in built.values()
        for resource in resources
        for name, excuse in resource["metadata"].get("annotations", {}).items()
        if name.startswith("checkov.io/")
    ]
    assert set(excused) == {"CKV_K8S_38=it starts and watches jobs, and may do nothing else (service-accounts.yaml)"}, (
        "an exception for one resource has its reason beside it"
    )
    assert report["summary"]["skipped"] == len(excused)


def tool(name: str) -> str:
    if not (TOOLS / name).exists():
        pytest.skip("needs the tools' own environment: `make tools` (make test builds it)")
    return str(TOOLS / name)


def test_every_pod_is_restricted_and_has_no_token_but_the_worker(overlay: list[Resource]) -> None:
    """Pod security "restricted", a read-only root besides, requests, memory limits, its own account."""
    for resource, spec, _ in pods(overlay):
        check_pod(resource["metadata"]["name"], spec)


def check_pod(name: str, spec: Resource) -> None:
    assert spec["automountServiceAccountToken"] is (name == "prefect-worker"), name
    assert spec["serviceAccountName"] not in ("", "default"), name
    assert spec["securityContext"]["runAsNonRoot"] is True, name
    assert spec["securityContext"]["runAsUser"] > 10000, name
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
    for container in containers(spec):
        security = container["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}, name
        assert container["resources"]["limits"]["memory"], name
        assert re.search(r":[\w.-]+$", container["image"]), f"{name}: {container['image']} has no tag"
        assert not container["image"].endswith(":latest"), name


def test_the_namespace_enforces_what_the_pods_keep(production: list[Resource]) -> None:
    """A pod added later cannot be laxer."""
    labels = named(production, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_service_has_three_kinds_of_probe(built: dict[str, list[Resource]]) -> None:
    """Started, alive and ready are three questions (KServe starts its predictor by readiness)."""
    for overlay in OVERLAYS:
        for resource, spec, _ in pods(built[overlay]):
            if resource["kind"] not in LONG_RUNNING:
                continue
            (container,) = spec["containers"]
            wanted = {"livenessProbe", "readinessProbe"}
            wanted |= set() if resource["kind"] == "InferenceService" else {"startupProbe"}
            assert wanted <= set(container), resource["metadata"]["name"]


def test_a_gateway_lives_by_itself_and_is_ready_by_its_model(production: list[Resource]) -> None:
    """Restarting a gateway does not mend a model server: liveness must not ask upstream."""
    (container,) = named(production, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_rolling_updates_take_no_pod_away_first_and_give_it_time_to_drain(production: list[Resource]) -> None:
    """A new pod is ready before an old one goes; the grace period covers preStop and the drain."""
    settings = gateway_settings(production)
    for name, drain_s in (("gateway", settings.drain_delay_s + settings.drain_timeout_s), ("model-server", 15)):
        deployment = named(production, "Deployment", name)["spec"]
        assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert "replicas" not in deployment, "the autoscaler's to choose: an apply would reset them"
        pod = deployment["template"]["spec"]
        sleep_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] > sleep_s + drain_s, name


def test_only_releases_can_write_the_model_store(built: dict[str, list[Resource]]) -> None:
    """A server that could write could change what all others serve."""
    for overlay in OVERLAYS:
        for resource, spec, _ in pods(built[overlay]):
            for container in containers(spec):
                for mount in container.get("volumeMounts", []):
                    if mount["name"] == "models":
                        assert mount["readOnly"] is True, resource["metadata"]["name"]


def test_what_is_referred_to_is_there(overlay: list[Resource], request: pytest.FixtureRequest) -> None:
    """Configuration, secrets, volumes, accounts: a missing one leaves a pod pending."""
    if "jobs/training" in request.node.callspec.params["overlay"]:
        pytest.skip("the job lives in the namespace of another overlay")
    there = {(resource["kind"], resource["metadata"]["name"]) for resource in overlay}
    for resource, spec, _ in pods(overlay):
        wanted = {("ServiceAccount", spec["serviceAccountName"])}
        for volume in spec.get("volumes", []):
            wanted |= {("ConfigMap", volume["configMap"]["name"])} if "configMap" in volume else set()
            wanted |= {("Secret", volume["secret"]["secretName"])} if "secret" in volume else set()
            claim = volume.get("persistentVolumeClaim")
            wanted |= {("PersistentVolumeClaim", claim["claimName"])} if claim else set()
        for container in containers(spec):
            wanted |= {("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])}
        assert wanted <= there, resource["metadata"]["name"]


def test_production_asks_for_api_keys_and_only_the_gateway_has_them(production: list[Resource]) -> None:
    """The settings name a file that the generated secret puts there; no other secret comes with it."""
    pod = named(production, "Deployment", "gateway")["spec"]["template"]["spec"]
    environment = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert set(environment) == {"DIGITS_API_KEYS_FILE", "DIGITS_REQUIRE_KEYS"}
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "api-keys"]
    (volume,) = [v["secret"] for v in pod["volumes"] if v["name"] == "api-keys"]
    (item,) = volume["items"]
    assert f"{mount['mountPath']}/{item['path']}" == environment["DIGITS_API_KEYS_FILE"]
    secret = named(production, "Secret")
    assert volume["secretName"] == secret["metadata"]["name"]
    assert item["key"] in secret["data"]
    for resource, spec, _ in pods(production):
        keys = [i["key"] for v in spec.get("volumes", []) if "secret" in v for i in v["secret"]["items"]]
        assert ("api_keys" in keys) == (resource["metadata"]["name"] == "gateway")


def test_services_budgets_scalers_and_policies_point_at_something(overlay: list[Resource]) -> None:
    """A selector with a typo selects nothing, and says nothing. Releases' pods are the worker's to make."""
    labels = [labels for _, _, labels in pods(overlay)] + [RELEASE_LABELS]

    def matched(selector: dict[str, str]) -> bool:
        return any(selector.items() <= each.items() for each in labels)

    for resource in overlay:
        spec = resource.get("spec", {})
        match resource["kind"]:
            case "Service":
                assert matched(spec["selector"]), resource
            case "PodDisruptionBudget":
                assert matched(spec["selector"]["matchLabels"]), resource
            case "NetworkPolicy":
                peers = [p for rule in spec.get("ingress", []) for p in rule.get("from", [])]
                peers += [p for rule in spec.get("egress", []) for p in rule.get("to", [])]
                selectors = [p["podSelector"]["matchLabels"] for p in peers if "podSelector" in p]
                assert matched(spec["podSelector"].get("matchLabels", {})), resource
                assert all(matched(selector) for selector in selectors), resource
            case "HorizontalPodAutoscaler":
                named(overlay, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])


def test_all_traffic_is_denied_unless_allowed(production: list[Resource]) -> None:
    """One policy selects every pod, both ways, and allows nothing."""
    policy = named(production, "NetworkPolicy", "deny-all")["spec"]
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_grpc_goes_round_the_pods(production: list[Resource]) -> None:
    """Headless services, and the gateway asks DNS for every address."""
    for name in ("model-server", "gateway-grpc"):
        assert named(production, "Service", name)["spec"]["clusterIP"] == "None"
    assert gateway_settings(production).upstream == "dns:///model-server:8500"


def test_both_model_servers_take_the_same_flags(built: dict[str, list[Resource]]) -> None:
    """Ours is started with TensorFlow Serving's flags, all of which it knows."""
    for overlay in ("overlays/local", "overlays/embedded"):
        (container,) = named(built[overlay], "Deployment", "model-server")["spec"]["template"]["spec"]["containers"]
        flags = parse(container["args"])
        assert (flags.port, flags.rest_api_port) == (8500, 8501)
        assert flags.model_config_file == "/models/models.config"
    assert container["image"].startswith("digits-model-server:")


def gateway_settings(resources: list[Resource]) -> Settings:
    config = next(
        r["data"] for r in resources if r["kind"] == "ConfigMap" and r["metadata"]["name"].startswith("gateway-")
    )
    return Settings(**{name.removeprefix("DIGITS_").lower(): value for name, value in config.items()})


def test_the_gateways_settings_are_settings(production: list[Resource]) -> None:
    """A misspelt name would be ignored."""
    config = next(
        r["data"] for r in production if r["kind"] == "ConfigMap" and r["metadata"]["name"].startswith("gateway-")
    )
    names = {name.removeprefix("DIGITS_").lower() for name in config}
    assert names <= set(Settings.model_fields)
    assert gateway_settings(production).host == "0.0.0.0"


def test_the_ingress_offers_what_people_need_over_tls_and_nothing_more(production: list[Resource]) -> None:
    """Every public path is a route of the gateway; metrics and health are not public."""
    rest = named(production, "Ingress", "gateway-rest")["spec"]
    paths = {path["path"]: path["pathType"] for path in rest["rules"][0]["http"]["paths"]}
    public = {route.path for route in ROUTES}
    for path, kind in paths.items():
        assert any(route == path or (kind == "Prefix" and route.startswith(path + "/")) for route in public), path
    offered = {
        route for route in public
        if route in paths or any(k == "Prefix" and route.startswith(p + "/") for p, k in paths.items())
    }  # fmt: skip
    assert public - offered == {"/metrics", "/healthz", "/readyz"}
    for name in ("gateway-rest", "gateway-grpc"):
        ingress = named(production, "Ingress", name)["spec"]
        assert ingress["tls"][0]["hosts"] == [rule["host"] for rule in ingress["rules"]]
        assert ingress["tls"][0]["secretName"]


def test_the_gateway_scales_on_a_metric_that_it_emits(production: list[Resource]) -> None:
    """And that the adapter's values serve under that name."""
    metrics = named(production, "HorizontalPodAutoscaler", "gateway")["spec"]["metrics"]
    assert {metric["type"] for metric in metrics} == {"Resource", "Pods"}
    (name,) = [metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods"]
    assert name in {family.name for family in Metrics().registry.collect()}
    (rule,) = yaml.safe_load((ROOT / "k8s" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")


def test_every_job_that_an_alert_asks_for_is_scraped_in_the_cluster_too(production: list[Resource]) -> None:
    """The job label is that of monitoring/prometheus.yml: the value, on service or pod, of the label that is named."""
    asked = set(re.findall(r'job="([\w-]+)"', (ROOT / "monitoring" / "rules.yml").read_text()))
    scraped = set()
    for monitor in production:
        if monitor["kind"] not in {"ServiceMonitor", "PodMonitor"}:
            continue
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (port,) = [one["port"] for key in ("endpoints", "podMetricsEndpoints") for one in monitor["spec"].get(key, [])]
        services = [r for r in production if r["kind"] == "Service"]
        (target,) = [
            r for r in services
            if wanted.items() <= r["metadata"]["labels"].items() and port in {p["name"] for p in r["spec"]["ports"]}
        ]  # fmt: skip
        scraped.add(target["metadata"]["labels"][monitor["spec"]["jobLabel"]])
    assert asked == {"gateway", "model-server", "pipeline"}
    assert asked <= scraped


def test_prometheus_rules_are_those_of_compose() -> None:
    """What is generated is what is in the repository: `make generated` after a change."""
    for path, text in generated().items():
        assert path.read_text(encoding="utf-8") == text, f"run `make generated`: {path} is not current"


def test_each_training_worker_knows_its_place(built: dict[str, list[Resource]]) -> None:
    """TF_CONFIG is valid JSON once Kubernetes has put the index in; the peers are the job's pods, by the service."""
    job = named(built["jobs/training"], "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (text,) = [variable["value"] for variable in container["env"] if variable["name"] == "TF_CONFIG"]
    service = named(built["jobs/training"], "Service")
    assert (spec["completionMode"], pod["subdomain"]) == ("Indexed", service["metadata"]["name"])
    for index in range(spec["completions"]):
        config = json.loads(text.replace("$(WORKER)", str(index)))
        assert config["task"] == {"type": "worker", "index": index}
        port = service["spec"]["ports"][0]["port"]
        peers = [f"{job['metadata']['name']}-{n}.{pod['subdomain']}:{port}" for n in range(spec["completions"])]
        assert config["cluster"]["worker"] == peers


def test_the_worker_serves_the_pool_that_the_deployments_name(built: dict[str, list[Resource]]) -> None:
    """prefect.yaml, the pool that the worker makes, the pool that it polls: one name; only variables the job has."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    pools = [one["work_pool"] for one in deployments if one["name"] == "kubernetes"]
    assert {pool["name"] for pool in pools} == {"digits-kubernetes"}
    template = json.loads((ROOT / "k8s" / "base" / "job-template.json").read_text())
    for pool in pools:
        assert set(pool["job_variables"]) <= set(template["variables"]["properties"])
        assert pool["job_variables"]["image"] == "{{ $DIGITS_PIPELINE_IMAGE }}"
    for overlay in ("overlays/local", "overlays/production"):
        pod = named(built[overlay], "Deployment", "prefect-worker")["spec"]["template"]["spec"]
        pool, deploy = pod["initContainers"]
        (worker,) = pod["containers"]
        assert pool["args"][:5] == ["prefect", "work-pool", "create", "digits-kubernetes", "--type=kubernetes"]
        assert deploy["args"][-2:] == ["--name", "kubernetes"]
        assert "--pool=digits-kubernetes" in worker["args"]
        assert deploy["env"] == [{"name": "DIGITS_PIPELINE_IMAGE", "value": worker["image"]}]
        assert {one["job_variables"]["namespace"] for one in pools} == {
            named(built[overlay], "Namespace")["metadata"]["name"]
        }


def test_the_job_of_a_release_is_valid_and_restricted() -> None:
    """job-template.json, filled in by Prefect's own worker, is a Job that the namespace and the policies admit."""
    code = """
import asyncio, json, sys, uuid
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration as Configuration
template = json.load(open(sys.argv[1]))
configuration = asyncio.run(Configuration.from_template_and_values(template, {"image": "digits-pipeline:0.1.0"}))
flow = Flow(name="release")
run = FlowRun(flow_id=flow.id, name="happy-hare")
deployment = DeploymentResponse(id=uuid.uuid4(), name="nightly", flow_id=flow.id)
configuration.prepare_for_flow_run(run, deployment, flow)
print(json.dumps(configuration.job_manifest))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "k8s" / "base" / "job-template.json")],
        env=clean_environment(PREFECT_API_URL="http://127.0.0.1:9/api"),  # nothing is asked; without it a server starts
        capture_output=True, text=True, check=False, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    for name in ("parallelism", "completions"):  # Prefect insists on them here, where a cluster knows no such fields
        assert job["spec"]["template"]["spec"].pop(name) == 1
    kubernetes_validate.validate(job, NEWEST, strict=True)
    check_pod("release", job["spec"]["template"]["spec"])
    assert RELEASE_LABELS.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][0] == "prefect"
    assert {"name": "DIGITS_SERVED_MODELS_DIR", "value": "/models"} in container["env"]
