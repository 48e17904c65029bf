"""What is published: a wheel made from the source distribution, what it needs, and what its files may import."""

import ast
import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import retro

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "retro").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
STAGES = ("database", "dataset", "train", "sample", "evaluate")


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def shipped() -> set[str]:
    """What an installed library consists of, as paths in the wheel."""
    files = [*SOURCES, ROOT / "retro" / "py.typed", *(ROOT / "retro").rglob("*.j2"), *(ROOT / "retro").rglob("*.css")]
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it.

    From a copy: setuptools takes modules that were deleted since from an old `build/` into a wheel.
    """
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "retro", project / "retro", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [p for p in ROOT.iterdir() if p.is_file()]:
        shutil.copy(path, project)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out]  # needs no network
    subprocess.run(command, cwd=project, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        yield wheel


def metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [p for p in wheel.namelist() if PurePosixPath(p).match(f"*.dist-info/{name}")]
    return wheel.read(path).decode()


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    files = {path for path in wheel.namelist() if ".dist-info/" not in path}
    assert files == shipped()
    assert {"retro/py.typed", "retro/cli/__init__.py", "retro/storage/files.py"} <= files
    assert any(path.startswith("retro/evaluation/") and path.endswith(".j2") for path in files), "no report template"


def test_the_wheel_says_what_it_is(wheel):
    metadata = email.message_from_string(metadata_file(wheel, "METADATA"))
    assert metadata["Name"] == "retro-lm"
    assert metadata["Version"] == retro.__version__
    assert metadata["Author"] and metadata["License-Expression"] == "MIT" and metadata.get_all("Classifier")
    assert {url.split(", ")[0] for url in metadata.get_all("Project-URL")} == {"Paper", "Tutorial"}
    assert "copyright" in metadata_file(wheel, "licenses/LICENSE").lower()


def test_the_wheel_installs_the_command(wheel):
    scripts = ConfigParser()
    scripts.read_string(metadata_file(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"retro": "retro.cli:main"}
    assert callable(__import__("retro.cli", fromlist=["main"]).main)


# What it needs.


def imported_packages(path: Path) -> set[str]:
    """The first names of all absolute imports of a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno} imports relatively"
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"retro"}


def test_every_package_that_is_imported_is_required_and_the_other_way_round():
    distributions = packages_distributions()
    imported = {
        canonicalize_name(distribution)
        for path in SOURCES
        for package in imported_packages(path)
        for distribution in distributions.get(package, [f"{package} (not installed)"])
    }
    assert imported <= names(CORE) | names(EXTRAS), "imported, but not required"
    assert names(CORE) <= imported, "required, but not imported"


def test_what_is_imported_when_a_file_is_opened_belongs_to_no_extra():
    distributions, core = packages_distributions(), names(CORE)
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]:
            opened = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for package in {name.partition(".")[0] for name in opened} - set(sys.stdlib_module_names) - {"retro"}:
                assert {canonicalize_name(d) for d in distributions[package]} <= core, f"{path}:{node.lineno}"


def test_faiss_is_not_demanded_by_the_name_of_its_cpu_build():
    assert not [path for path in SOURCES if "faiss-cpu" in path.read_text() or "faiss_cpu" in path.read_text()]


def test_every_requirement_is_pinned_within_its_bounds():
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and not specifier.version.endswith("*"), pin
        assert canonicalize_name(pin.name) not in versions, f"{pin.name} is pinned twice"
        versions[canonicalize_name(pin.name)] = specifier.version
    for requirement in (*CORE, *EXTRAS):
        assert {s.operator for s in requirement.specifier} == {">="}, f"{requirement}: plain lower bounds only"
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_every_test_that_the_claims_name_is_there():
    page = (ROOT / "docs" / "claims.md").read_text()
    named = set(re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", page))
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
    rows = [
        line
        for line in page.partition("## Figures")[0].splitlines()
        if line.startswith("| ") and "| tests |" not in line
    ]
    assert len(rows) > 50 and all("::test_" in row for row in rows)


# What its files may import. `make layers` checks the layers; this is what it takes no notice of.


def imports_the_command_line(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        named = {alias.name for alias in node.names} if module == "retro" else set()
        return module.split(".")[:2] == ["retro", "cli"] or "cli" in named
    return isinstance(node, ast.Import) and any(a.name.split(".")[:2] == ["retro", "cli"] for a in node.names)


def is_script_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_knows_the_command_line_in_its_last_lines_only(stage):
    *library, guard = ast.parse((ROOT / "retro" / f"{stage}.py").read_text()).body
    assert is_script_guard(guard) and any(map(imports_the_command_line, ast.walk(guard)))
    assert not [n.lineno for statement in library for n in ast.walk(statement) if imports_the_command_line(n)]


def test_only_scripts_know_the_command_line():
    allowed = {*STAGES, "__main__"}
    for path in [p for p in SOURCES if "cli" not in p.relative_to(ROOT).parts]:
        known = any(map(imports_the_command_line, ast.walk(ast.parse(path.read_text()))))
        assert known == (path.parent.name == "retro" and path.stem in allowed), path


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, retro; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "faiss", "transformers", "numpy", "jsonargparse"} & set(loaded)
    assert "retro" in loaded


# The mistakes that the tests have to notice (`make mutants`).


def test_each_mistake_of_the_list_can_be_made_and_names_tests_that_there_are():
    listed = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutants"]
    assert len(listed) > 60 and len({(m["file"], m["old"], m["new"]) for m in listed}) == len(listed)
    for mistake in listed:
        source = (ROOT / "retro" / mistake["file"]).read_text()
        assert source.count(mistake["old"]) == 1, mistake
        ast.parse(source.replace(mistake["old"], mistake["new"]))
        for test in mistake["tests"].split():
            file, _, name = test.partition("::")
            there = re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)
            assert name.partition("[")[0] in there, test
