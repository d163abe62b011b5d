"""Every command that the documentation prints is run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import domainbed_kd

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
         *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page):
    """Whole command lines, continuations joined, without what CI runs by itself."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("python -m domainbed_kd"):
                yield " ".join(line.split("#")[0].split())


def run_all(lines, folder):
    """Runs them in one folder, in turn, with this interpreter as `python`."""
    (folder / "sweeps").symlink_to(ROOT / "sweeps")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        process = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True,
                                 env={**os.environ, "PATH": path}, timeout=1200)
        assert process.returncode == 0, f"{line}\n{process.stdout}\n{process.stderr}"


def run_python(code, folder):
    process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True,
                             text=True, timeout=600)
    assert process.returncode == 0, f"{code}\n{process.stdout}\n{process.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work_as_printed(page, tmp_path):
    for i, code in enumerate(blocks(page, "python")):
        name = re.search(r"`(\w+\.py)`", page.read_text(encoding="utf-8"))
        if i == 0 and name:
            (tmp_path / name.group(1)).write_text(code, encoding="utf-8")
    run_all(commands(page), tmp_path)
    if page.name in ("analysis.md", "python.md"):
        for code in blocks(page, "python"):
            run_python(code, tmp_path)


@pytest.mark.slow
def test_a_users_code_passes_mypy_in_strict_mode(tmp_path):
    for i, code in enumerate(blocks(ROOT / "docs" / "python.md", "python")):
        (tmp_path / f"block{i}.py").write_text(code, encoding="utf-8")
    # PyTorch annotates neither `backward` nor what a ConcatDataset holds.
    process = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--allow-untyped-calls",
         "--disable-error-code", "var-annotated", "--follow-imports",
         "silent", "--ignore-missing-imports", *map(str, sorted(tmp_path.glob("*.py")))],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "MYPYPATH": str(ROOT)})
    assert process.returncode == 0, process.stdout + process.stderr
    assert "no issues found in 6 source files" in process.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        where = (page.parent / target).resolve()
        assert target.startswith("https://") or where.exists(), target
        if ROOT / "docs" in page.parents and not target.startswith("https://"):
            assert ROOT / "docs" in where.parents, f"{target} is not on the site"


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.args")), ids=lambda p: p.name)
def test_a_sweep_file_states_its_command_and_plans(path, tmp_path):
    head = path.read_text(encoding="utf-8").split("--datasets")[0]
    assert f"sweep launch @sweeps/{path.name}" in head and "Cost" in head
    plan = subprocess.run(
        [sys.executable, "-m", "domainbed_kd.scripts.sweep", "launch", f"@{path}",
         "--command_launcher", "dummy", "--output_dir", str(tmp_path), "--data_dir", "d"],
        capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    assert re.search(r"^[1-9]\d* jobs: 0 done", plan.stdout, re.MULTILINE)


def test_the_files_that_the_page_on_architecture_names_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = set(re.findall(r"[a-z_]+(?:/[a-z_]+)*\.py", page))
    known = {str(path.relative_to(ROOT / "domainbed_kd"))
             for path in (ROOT / "domainbed_kd").rglob("*.py")}
    assert len(names) > 20 and names - {"tests/test_architecture.py"} <= known


def test_the_citation_states_the_packages_version():
    stated = re.search(r"(?m)^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert stated[1] == domainbed_kd.__version__


def test_the_printed_method_takes_forty_lines_of_code():
    code, = blocks(ROOT / "docs" / "your_method.md", "python")[:1]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40
