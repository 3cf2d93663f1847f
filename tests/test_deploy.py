"""Facts that are written in two places agree: versions, and what Dockerfile and Kubernetes manifest say of the server.

Neither has been built or applied.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mlmkit
from mlmkit import distributed
from mlmkit.cli.inference import serve
from mlmkit.serve.limits import Limits
from mlmkit.serve.metrics import Metrics
from mlmkit.serve.middleware import ENDPOINTS

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_of_this_version():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == mlmkit.__version__


def test_pre_commit_checks_with_the_ruff_of_the_tests():
    repositories = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (revision,) = [each["rev"] for each in repositories if "ruff" in each["repo"]]
    assert f"ruff=={revision.removeprefix('v')}" in read("constraints.txt").split()


def test_the_workflow_runs_targets_that_exist_from_the_oldest_python_on():
    jobs = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    wanted = set(re.findall(r"make ([a-z]+)", "\n".join(runs)))
    assert {"test", "docs"} <= wanted <= set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    oldest = re.search(r'requires-python = ">=([\d.]+)"', read("pyproject.toml"))
    assert oldest and jobs["test"]["strategy"]["matrix"]["python"][0] == oldest[1]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_the_demo_installs_less_than_the_tests_and_nothing_where_they_are_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements-transformers4.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests" / "transformersjs").mkdir(parents=True)
    (tmp_path / "tests" / "transformersjs" / "package.json").touch()

    def installed_by(target: str) -> list[str]:
        done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        return re.findall(r"--editable '\.\[(.+)\]'", done.stdout)

    assert [installed_by(target) for target in ("demo", "test", "docs")] == [["train,serve,report"], ["dev"], ["dev"]]
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", "installed"):
        (tmp_path / ".venv" / name).touch()
    assert [installed_by(target) for target in ("demo", "test")] == [[], []]


# ---------------------------------------------------------------- image and manifest


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(read("deploy/kubernetes.yaml"))}


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
    dockerfile = read("Dockerfile")
    copied = {name for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]}
    let_in = set(re.findall(r"^!(.+)$", read(".dockerignore"), re.MULTILINE))
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
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(distributed, "CPU_LIMIT", tmp_path / "none")
    unlimited = distributed.cores()
    monkeypatch.setattr(distributed, "CPU_LIMIT", tmp_path / "cpu.max")
    assert distributed.cores() == (expected or unlimited)
