"""The second half of the check, inside the namespaces: start the image, do the main job, stop it."""

from __future__ import annotations

import base64
import errno
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2
from msgspec import MsgspecError, Struct, json

from service import __version__
from service.demo.run import JOBS
from service.devstack import SANDBOX_USER_KEY
from tests.image.buildah import Config
from tests.image.container import Container, RunningContainer, parse_user, wait_until
from tests.image.report import CheckFailed, expect, step
from tests.image.sandbox_ns import SECRETS, connect_loopback, mount_rootfs
from tests.process.sandbox import run_sandbox
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

_TENANTS = "http://127.0.0.1:8080"
_OPERATORS = "http://127.0.0.1:8081"
_IDENTITY_PROGRAM = (
    "import os, pathlib; status = pathlib.Path('/proc/self/status').read_text();"
    "print(os.getuid(), os.getgid(), os.getgroups(), *(line.split()[1] for line in status.splitlines()"
    " if line.startswith(('CapEff', 'NoNewPrivs'))))"
)
_IMPORT_PROGRAM = "import service.cli.serve"
_STOP_SECONDS = 10.0


class SmokeTestInput(Struct):
    """The input of the smoke test.

    Attributes:
        config: of the image.
        tree: the folder with its files.
        folder: an empty folder, deleted after the namespaces have ended.

    """

    config: Config
    tree: str
    folder: str


class _Token(Struct):
    token: str


class _Policy(Struct):
    unit: str
    remaining: float


class _Quota(Struct):
    policies: Sequence[_Policy]


class _Line(Struct):
    level: str


def main() -> None:
    """Read the input from standard input and run all checks; exits with 1 at the first failure."""
    inputs = json.decode(sys.stdin.buffer.read(), type=SmokeTestInput)
    with ExitStack() as opened:
        folder = Path(inputs.folder)
        root = folder / "root"
        root.mkdir()
        with step("image: isolated namespaces, with a store and an upstream"):
            connect_loopback()
            mount_rootfs(Path(inputs.tree), root, _secrets(), *parse_user(inputs.config.user))
            store = opened.enter_context(run_valkey(port=reserve_port()))
            upstream = opened.enter_context(run_sandbox())
        container = Container(root, inputs.config, _settings(store.port, upstream.url))
        with step("image: runs as its user on a read-only root"):
            _expect_confined(container, root, inputs.config)
        with step("image: loads bytecode only"):
            _expect_bytecode(container)
        with step("image: names missing settings and modules"):
            _expect_clear_errors(container)
        with step("image: starts, and its health check reports that"):
            expect(_run_healthcheck(container, inputs.config) == 1, "the health check does not fail without a gateway")
            gateway = opened.enter_context(container.start(folder / "log"))
            wait_until(lambda: _is_ready(gateway), "readiness")
            expect(_run_healthcheck(container, inputs.config) == 0, f"{_read_log(gateway)}the health check fails")
            expect(_get_status(f"{_TENANTS}/healthz") == 200, "the tenants' port has no /healthz")
        with step("image: does the main job") as figures:
            figures.append(f"{len(JOBS)} images")
            _run_main_job(container, gateway, folder / "results")
        with step("image: leaves nothing behind"):
            left = [path.name for path in (root / "tmp").iterdir()]
            expect(not left, f"left in the scratch folder: {', '.join(left)}")
        with step("image: stops cleanly on its signal"), _idle_connection():
            started_at = time.monotonic()
            code = gateway.stop(signal.Signals[inputs.config.stop_signal])
            expect(code == 0, f"{_read_log(gateway)}it ended with exit code {code}")
            expect(
                time.monotonic() - started_at < _STOP_SECONDS,
                f"{_read_log(gateway)}it took more than {_STOP_SECONDS:g} s",
            )
            _expect_clean_log(gateway)


def _secrets() -> Mapping[str, str]:
    return {
        "secret-keys": base64.b64encode(secrets.token_bytes(32)).decode(),
        "admin-token": secrets.token_urlsafe(32),
    }


def _settings(store: int, upstream: str) -> Mapping[str, str]:
    return {
        "GATEWAY_REDIS_URL": f"redis://127.0.0.1:{store}",
        "GATEWAY_UPSTREAM_URL": upstream,
        "GATEWAY_SECRET_KEYS_FILE": str(SECRETS / "secret-keys"),
        "GATEWAY_ADMIN_TOKEN_FILE": str(SECRETS / "admin-token"),
        "GATEWAY_POLL_SECONDS": "0.1",
    }


def _expect_confined(container: Container, root: Path, config: Config) -> None:
    """Require the confinement itself, without which the other checks are meaningless."""
    user, group = parse_user(config.user)
    event = container.check_output("python", "-c", _IDENTITY_PROGRAM).split()
    expected = [str(user), str(group), "[]", "0000000000000000", "1"]
    expect(event == expected, f"user, group, groups, capabilities and no-new-privileges are {event}, not {expected}")
    try:
        (root / "app" / "written").touch()
    except OSError as error:
        expect(error.errno == errno.EROFS, f"the root can't be written to, but for another reason: {error}")
    else:
        raise CheckFailed("the root can be written to")


def _expect_bytecode(container: Container) -> None:
    """With a read-only root, a module without valid bytecode would be compiled at every start."""
    output = container.check_output("python", "-v", "-c", _IMPORT_PROGRAM)
    loaded = re.findall(r"^# code object from '?(/app/.*?)'?$", output, re.MULTILINE)
    compiled = [path for path in loaded if path.endswith(".py")]
    expect(loaded, "Python reports no loaded module")
    expect(not compiled, f"{len(compiled)} modules are compiled at the start, such as {compiled[:1]}")


def _expect_clear_errors(container: Container) -> None:
    output = container.check_output("gateway", "--version").strip()
    expect(output.endswith(f" {__version__}"), f"its version is {output!r}, not {__version__}")
    for words, code, names in (
        (("serve",), 2, ("GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL", "GATEWAY_SECRET_KEYS", "GATEWAY_ADMIN_TOKEN")),
        (("sandbox",), 1, ("imaging-gateway[local]",)),
    ):
        result, output = container.execute("gateway", *words, without_settings=True)
        plain = all(name in output for name in names) and "Traceback" not in output
        expect(
            result == code and plain, f"{output}`gateway {words[0]}` ended with exit code {result} or without the names"
        )


def _run_main_job(container: Container, gateway: RunningContainer, results: Path) -> None:
    """Create an account, a tenant and a token with the image's command, and run the demo with them."""
    container.check_output("gateway", "account", "create", "main", "--user-key-file", "-", stdin=SANDBOX_USER_KEY)
    limit = f"total:tasks={len(JOBS)}"
    container.check_output("gateway", "tenant", "create", "shop", "--account", "main", "--limit", limit)
    created = json.decode(container.check_output("gateway", "token", "create", "shop", "--json"), type=_Token)
    own = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    # The demo checks the images with a library that the image does not have.
    demo = [
        sys.executable,
        "-m",
        "service",
        "demo",
        "--url",
        _TENANTS,
        "--token",
        created.token,
        "--folder",
        str(results),
    ]
    done = subprocess.run(demo, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    expect(done.returncode == 0, f"{_read_log(gateway)}{done.stdout}the demo ended with exit code {done.returncode}")
    quota = json.decode(container.check_output("gateway", "quota", "shop", "--json"), type=_Quota)
    left = [policy.remaining for policy in quota.policies if policy.unit == "tasks"]
    expect(left == [0], f"of a limit of {len(JOBS)} tasks, {left} are left")


def _expect_clean_log(gateway: RunningContainer) -> None:
    """Require that each log line is JSON without warnings."""
    for line in gateway.log.read_text().splitlines():
        try:
            output = json.decode(line, type=_Line)
        except MsgspecError:
            raise CheckFailed(f"{_read_log(gateway)}a line of the log is not JSON: {line}") from None
        expect(output.level in {"debug", "info"}, f"the log has a warning: {line}")


def _run_healthcheck(container: Container, config: Config) -> int:
    words = config.healthcheck.test if config.healthcheck else []
    expect(words[:1] == ["CMD"], f"the health check must be in exec form, not {words}")
    return container.execute(*words[1:])[0]


def _is_ready(gateway: RunningContainer) -> bool:
    gateway.expect_alive()
    with suppress(httpx2.TransportError):
        return _get_status(f"{_OPERATORS}/readyz") == 200
    return False


def _get_status(url: str) -> int:
    return httpx2.get(url, trust_env=False).status_code


@contextmanager
def _idle_connection() -> Iterator[None]:
    """Keep an idle connection open, as clients and load balancers do."""
    with httpx2.Client(trust_env=False) as client:
        client.get(f"{_TENANTS}/healthz").raise_for_status()
        yield


def _read_log(gateway: RunningContainer) -> str:
    return gateway.log.read_text()


if __name__ == "__main__":
    main()
