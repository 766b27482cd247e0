"""The table of what each stage's result depends on, beside what the stage really imports."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

import reptile.provenance
from reptile.cli.under_dvc import NAMED_SOURCES, check_code, check_data, check_networks
from reptile.errors import InputError
from reptile.provenance import PACKAGE, STAGES, Stage, code_sha256, sources
from reptile.settings import PrepareSettings, TrainSettings

# Names that are read, and code that says where a result came from: they shape none.
NEUTRAL = {PACKAGE / "__init__.py", PACKAGE / "provenance.py"}


def modules(name: str) -> Iterator[Path]:
    """The files that importing a dotted name runs: its packages, and itself."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = PACKAGE.parent.joinpath(*parts[:end])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                yield file


def run_nodes(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All that may run, functions too, but not what only type checkers read."""
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from run_nodes(ast.iter_child_nodes(node))


def imported(nodes: Iterable[ast.AST]) -> set[Path]:
    found: set[Path] = set()
    for node in run_nodes(nodes):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found.update(file for name in names if name.startswith("reptile") for file in modules(name))
    return found


def closure(stage: Stage) -> set[Path]:
    """The modules that a stage's function may import, directly or through others."""
    stages = PACKAGE / "stages.py"
    tree = ast.parse(stages.read_text(encoding="utf-8"))
    run = [node for node in tree.body if getattr(node, "name", stage) == stage]
    assert len(run) < len(tree.body)
    seen = {stages}
    todo = imported(run) - seen
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= imported(ast.parse(path.read_text(encoding="utf-8")).body) - seen
    return seen - NEUTRAL


def package_of(path: Path) -> Path:
    """The nearest `__init__.py` at or above a file."""
    folder = next(each for each in path.parents if (each / "__init__.py").is_file())
    return folder / "__init__.py"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_modules_that_it_imports_and_no_others(stage: Stage) -> None:
    covered = {path for path in sources(stage) if path.suffix == ".py"}
    needed = closure(stage)
    assert {str(path) for path in needed - covered} == set(), "missing in the table"
    assert {str(path) for path in covered - needed} == set(), "in the table, never imported"


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_imports_when_it_starts_is_in_its_table(stage: Stage) -> None:
    """A second way, for imports that no `import` statement names."""
    tree = ast.parse((PACKAGE / "stages.py").read_text(encoding="utf-8"))
    function = next(node for node in tree.body if getattr(node, "name", "") == stage)
    lines = [
        ast.unparse(node)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    lines += [
        "import sys, reptile.stages",
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'reptile'))",
    ]
    program = "\n".join(lines)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = {Path(name) for name in done.stdout.split()} - NEUTRAL
    assert loaded <= set(sources(stage))


def test_a_file_that_is_no_module_belongs_to_a_stage_that_imports_its_package() -> None:
    for stage in STAGES:
        others = {path for path in sources(stage) if path.suffix != ".py"}
        assert {package_of(path) for path in others} <= closure(stage) | NEUTRAL, stage
    read = {package_of(path) for path in PACKAGE.rglob("*.json")}
    read |= {package_of(path) for path in PACKAGE.rglob("*.html")}
    assert PACKAGE / "data/__init__.py" in read
    assert {"block.h", "kernel.cpp"} <= {path.name for path in sources("train")}
    assert "page.html" in {path.name for path in sources("evaluate")}
    assert "cifar-fs.json" in {path.name for path in sources("prepare")}


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_depends_on_the_same_code(stage: Stage, root: Path) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for name in (stage, f"{stage}-beside"):
        if name in stages:
            code = [each for each in stages[name]["deps"] if each.startswith("reptile/")]
            assert code == [f"reptile/{path}" for path in STAGES[stage]]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, whose sources a test may change."""
    copy = tmp_path / "reptile"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "ort"))
    monkeypatch.setattr(reptile.provenance, "PACKAGE", copy)
    return copy


def changed(package: Path, file: str) -> set[str]:
    """The stages whose code is another one after a comment in a file."""
    before = {stage: code_sha256(stage) for stage in STAGES}
    path = package / file
    path.write_text(path.read_text(encoding="utf-8") + "\n# a comment\n", encoding="utf-8")
    return {stage for stage in STAGES if code_sha256(stage) != before[stage]}


def test_the_server_and_the_command_line_are_no_part_of_any_stage(package: Path) -> None:
    served = [path for path in package.rglob("*.py") if path.parent.name in {"serve", "cli"}]
    assert len(served) > 10
    for path in served:
        assert changed(package, str(path.relative_to(package))) == set()


def test_each_part_changes_the_stages_that_use_it(package: Path) -> None:
    assert changed(package, "export/verify/parity.py") == {"verify"}
    assert changed(package, "evaluate/gate.py") == {"export"}
    assert changed(package, "learn/run.py") == {"train"}
    assert changed(package, "data/readers/open.py") == {"prepare"}
    assert changed(package, "settings.py") == set(STAGES)


def test_only_sources_are_hashed(package: Path) -> None:
    before = code_sha256("train")
    (package / "learn/__pycache__").mkdir()
    (package / "learn/__pycache__/train.cpython-311.pyc").write_bytes(b"byte-code")
    (package / "learn/engines/native/kernel.so").write_bytes(b"compiled")
    assert code_sha256("train") == before


def test_the_code_of_more_stages_is_hashed_as_one() -> None:
    assert code_sha256("train", "evaluate") == code_sha256("evaluate", "train")
    assert (
        len({code_sha256("train", "evaluate"), code_sha256("train"), code_sha256("evaluate")}) == 3
    )


def test_each_source_that_is_a_name_has_a_file_for_dvc_to_depend_on(root: Path) -> None:
    for name in NAMED_SOURCES:
        assert f"`{name}`" in (root / name).read_text()


def test_code_that_dvc_did_not_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.chdir(PACKAGE.parent)
    check_code()
    monkeypatch.chdir(tmp_path)
    check_code()  # a project that only uses the installed package
    (tmp_path / "reptile").mkdir()
    with pytest.raises(InputError, match="PYTHONSAFEPATH"):
        check_code()


def test_data_that_dvc_does_not_follow_is_refused_under_dvc_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def check(*cross_domain: str) -> None:
        check_data(PrepareSettings(source="birds.zip", cross_domain=cross_domain))

    monkeypatch.delenv("DVC_STAGE", raising=False)
    check("fish")
    monkeypatch.setenv("DVC_STAGE", "prepare")
    check("digits", "datasets/fish", "birds.zip")
    for source in ("fish", "datasets/../fish", "/datasets/fish"):
        with pytest.raises(InputError, match="DVC would not see"):
            check("digits", source)
    check_data(PrepareSettings(source="birds", cross_domain=(), held_out="datasets/split.json"))
    with pytest.raises(InputError, match=r"prepare.held_out = split.json"):
        check_data(PrepareSettings(source="birds", cross_domain=(), held_out="split.json"))


@pytest.mark.parametrize("stage", ["train", "train-beside"])
@pytest.mark.parametrize("tower", [False, True])
def test_networks_that_dvc_does_not_follow_are_refused_under_dvc_alone(
    stage: str, tower: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed file of weights, or of code, would leave the old result in DVC's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/network.py").touch()
    stages = yaml.safe_load((root / "dvc.yaml").read_text())

    def check(network: dict[str, object], **deps: str) -> None:
        for name, dep in deps.items():
            stages["stages"][name.replace("_", "-")]["deps"].append(dep)
        (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(stages))
        model = {"towers": [{"name": "conv4"}, network]} if tower else network
        settings = {"algorithm": "ridge", "model": model}
        check_networks(TrainSettings.model_validate(settings))

    module: dict[str, object] = {"name": "module:mine.network.make"}
    weights: dict[str, object] = {"name": "resnet12", "weights": "other/weights.safetensors"}
    monkeypatch.delenv("DVC_STAGE", raising=False)
    check(module)
    monkeypatch.setenv("DVC_STAGE", stage)
    with pytest.raises(
        InputError,
        match=r"mine\.network\.make: DVC would not see changes of mine.network\.py; add it to the "
        rf"deps of {stage}, evaluate, export, verify in dvc\.yaml",
    ):
        check(module)
    with pytest.raises(InputError, match="deps of export in dvc"):
        check(module, **{stage: "mine"}, evaluate="mine/network.py", verify="mine")
    check(module, export="mine")
    with pytest.raises(InputError, match=rf"other.weights\.safetensors; .* deps of {stage} in"):
        check(weights)
    check(weights, **{stage: "other"})
    check({"name": "resnet12", "weights": "DEFAULT"} if not tower else {"name": "mlp"})
    check({"name": "module:numpy.array"})  # installed
    check({"name": "module:mine.nothing.make"})  # which building the network will refuse
