"""The deployment's files agree with the code: versions, flags, names of metrics."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import prometheus_client
import pytest
import yaml

from sglang_multipole.config import MultipoleConfig
from sglang_multipole.metrics import MultipoleMetrics
from sglang_multipole.sglang_compat import TESTED_VERSIONS
from tests.test_cluster_pool import SMALL, Host
from tests.test_metrics import LABELS, make_collector

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "deploy"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "multipole.json").read_text())
NAME = re.compile(r"sglang:multipole_(\w+)")


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The metrics' names, each with those of its samples."""
    registry = prometheus_client.CollectorRegistry()
    MultipoleMetrics(make_collector(registry, LABELS), Host(SMALL).runtime)
    strip = "sglang:multipole_"
    return {
        metric.name.removeprefix(strip): {
            sample.name.removeprefix(strip)
            for sample in metric.samples
            if not sample.name.endswith("_created")
        }
        for metric in registry.collect()
    }


def test_the_dashboard_shows_every_metric_and_no_other(exported: dict[str, set[str]]) -> None:
    shown = set(NAME.findall(json.dumps(DASHBOARD)))
    assert shown <= set().union(*exported.values())
    for name, samples in exported.items():
        assert samples & shown, f"{name} is in no panel"


def test_the_dashboards_panels_are_whole() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            assert expression.count("{") == expression.count("}")
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)


def test_the_image_is_of_a_version_that_is_tested() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert re.findall(r"^FROM lmsysorg/sglang:v(\S+)$", text, re.MULTILINE) == list(TESTED_VERSIONS)


def test_the_image_has_all_that_the_package_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (FOLDER / "Dockerfile").read_text()
    assert project["dependencies"]
    for requirement in project["dependencies"]:
        assert f'"{requirement}"' in text


def test_the_composed_server_has_a_valid_configuration() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    flags = dict(flag.split("=", 1) for flag in services["sglang"]["command"] if "=" in flag)
    assert MultipoleConfig.parse(flags["--multipole-config"]).audit_interval == 64
    assert "--enable-metrics" in services["sglang"]["command"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_prometheus_asks_the_composed_server() -> None:
    scrape = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    assert scrape[0]["static_configs"][0]["targets"] == ["sglang:30000"]
    folder = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    uids = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]}
    assert uids == {source["uid"]}
