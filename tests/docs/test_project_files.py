"""What contributors and GitHub read agrees with the project: workflows, templates, the guide, the citation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_prefix_plus import __version__


ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
HOME = "https://github.com/peft-prefix-plus/peft-prefix-plus"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GUIDES = [ROOT / name for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", ".github/pull_request_template.md")]
YAML = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(job: dict[str, Any]) -> list[str]:
    """What a job runs, once for each value of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    lines = [step["run"] for step in job["steps"] if "run" in step]
    return [line.replace("${{ matrix.target }}", target) for line in lines for target in matrix.get("target", [""])]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_files_for_tools_are_yaml(path: Path) -> None:
    assert isinstance(load(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_targets_only(path: Path) -> None:
    lines = [line for job in load(path)["jobs"].values() for line in commands(job)]
    for line in lines:
        name = re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S+| \w+=\$\{\{[^}]*\}\})?", line)
        assert name and name[1] in TARGETS, line


def test_the_checks_are_those_of_the_local_run() -> None:
    local = set(re.findall(r"^(make [a-z-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = load(ROOT / ".github" / "workflows" / "checks.yml")["jobs"]
    assert {line for job in jobs.values() for line in commands(job)} == local | {"make test-gpu", "make test-serving"}


def test_the_checks_run_on_every_python_that_is_supported() -> None:
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert supported and f'requires-python = ">={supported[0]}"' in PYPROJECT
    matrix = load(ROOT / ".github" / "workflows" / "checks.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == supported


def test_a_release_is_published_without_a_token_and_only_from_a_tag() -> None:
    path = ROOT / ".github" / "workflows" / "release.yml"
    release = load(path)
    assert release[True] == {"push": {"tags": ["v[0-9]*"]}}  # YAML reads `on` as a truth value
    publish = release["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_guides_name_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for named in re.findall(r"`make ([a-z -]+)`", text):
        assert set(named.split()) <= TARGETS, named
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https:") or (page.parent / target).exists(), target


def test_every_page_names_the_same_home() -> None:
    assert f'Homepage = "{HOME}"' in PYPROJECT
    assert load(ROOT / "CITATION.cff")["repository-code"] == HOME
    for path in [*GUIDES, *YAML]:
        for link in re.findall(
            r"https://github\.com/[\w.-]+/peft-prefix-plus[\w./-]*", path.read_text(encoding="utf-8")
        ):
            assert link == HOME or link.startswith(f"{HOME}/"), link


def test_the_citation_names_the_papers_of_the_readme() -> None:
    def papers(text: str) -> set[str]:
        return set(re.findall(r"arxiv\.org/abs/([\d.]+)", text))

    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Citation")[2]
    references = load(ROOT / "CITATION.cff")["references"]
    assert {each["url"].rpartition("/")[2] for each in references} == papers(readme)
    words = " ".join(readme.split())
    assert all(each["title"] in words for each in references)


def test_the_changelog_is_about_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert __version__ in headings or len(headings) == 1  # before the first release
