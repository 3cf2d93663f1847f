"""Facts that are written in two places agree."""

import re
from pathlib import Path

import yaml

import mlmkit

ROOT = Path(__file__).parent.parent


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version():
    assert load("CITATION.cff")["version"] == mlmkit.__version__


def test_pre_commit_checks_with_the_ruff_of_the_tests():
    (revision,) = [repo["rev"] for repo in load(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    assert f"ruff=={revision.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().split()


def test_the_workflow_runs_targets_that_exist_from_the_oldest_python_on():
    jobs = load(".github/workflows/test.yml")["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    wanted = set(re.findall(r"make ([a-z]+)", "\n".join(runs)))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "docs"} <= wanted <= targets
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest and jobs["test"]["strategy"]["matrix"]["python"][0] == oldest[1]
