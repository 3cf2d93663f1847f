"""Dockerfile and manifest agree with the server on paths, names and times. Neither has been built or applied."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlmkit.cli.inference import serve
from mlmkit.serve.limits import Limits
from mlmkit.serve.metrics import Metrics
from mlmkit.serve.middleware import ENDPOINTS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def test_the_grace_period_covers_the_drain(manifest):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = serve.make_context("serve", ["/model", *container["args"]]).params
    drain = options["drain_seconds"] or Limits(1, 1, 1).drain_seconds
    _, sleep = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= float(sleep) + drain + 5


def test_the_manifest_names_the_servers_paths_ports_and_metrics(manifest):
    template = manifest["Deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    annotations = template["metadata"]["annotations"]
    paths = {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
    assert {annotations["prometheus.io/path"], *paths} <= set(ENDPOINTS)
    (port,) = container["ports"]
    default = serve.make_context("serve", ["/model"]).params["port"]
    assert port["containerPort"] == int(annotations["prometheus.io/port"]) == default
    metric = manifest["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric in {family.name for family in Metrics().registry.collect()}


def test_the_parts_of_the_manifest_refer_to_each_other(manifest):
    deployment, service = manifest["Deployment"], manifest["Service"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["selector"] == labels
    assert manifest["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_the_image_is_made_of_existing_files(manifest):
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]}
    let_in = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
    user = manifest["Deployment"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert set(re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)) == {str(user)}


def test_the_dockerfile_lints():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed: it has no wheel for this machine")
    lint = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (lint.returncode, lint.stdout) == (0, ""), lint.stdout


@pytest.mark.parametrize(("limit", "expected"), [("100000 100000", 1), ("10000 100000", 1), ("max 100000", None)])
def test_a_containers_limit_bounds_the_threads(limit, expected, tmp_path, monkeypatch):
    from mlmkit import distributed

    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(distributed, "CPU_LIMIT", tmp_path / "none")
    unlimited = distributed.cores()
    monkeypatch.setattr(distributed, "CPU_LIMIT", tmp_path / "cpu.max")
    assert distributed.cores() == (expected or unlimited)
