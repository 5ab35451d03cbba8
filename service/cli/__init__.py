"""The command `gateway`."""

from __future__ import annotations

import click

from service import __version__
from service.cli.common import FieldErrorGroup, LazyCommand

_COMMANDS = {
    "account": ("admin", "Manage accounts at the upstream."),
    "tenant": ("admin", "Manage tenants, which submit tasks."),
    "token": ("admin", "Manage the bearer tokens of tenants."),
    "webhook": ("usage", "Manage webhooks, which report finished tasks to tenants."),
    "clock": ("admin", "Manage the clock of the ledger."),
    "quota": ("usage", "Show the limits of TENANT and their use."),
    "usage": ("usage", "Show tasks and spending of tenants, including deleted ones."),
    "task": ("usage", "Show tasks of tenants."),
    "submission": ("usage", "Show the outcome of the submission ID, which may be the id of its task."),
    "refund": ("usage", "Return the cost of ID, a task or a submission, to its tenant's limits, once."),
    "export": ("registry", "Print the registry as TOML: accounts, tenants and tokens."),
    "apply": ("registry", "Change the registry to match FILE, and show the differences."),
    "rotate-keys": ("registry", "Encrypt all secrets of the registry with the first of GATEWAY_SECRET_KEYS."),
    "serve": ("serve", "Run the gateway until SIGINT or SIGTERM."),
    "check-config": ("check_config", "Print the effective settings, or all their errors, and start nothing."),
    "sandbox": ("dev", "Run a stand-in for the upstream: the vendor's API with real image processing."),
    "demo": ("dev", "Submit an image of each kind to a running gateway, and check the results."),
    "openapi": ("dev", "Write the OpenAPI documents of both ports."),
}


@click.group(cls=FieldErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """The Imaging Gateway: tenants, quota and exact spending in front of a paid image API."""


for _name, (_module, _summary) in _COMMANDS.items():
    main.add_command(LazyCommand(_name, f"service.cli.{_module}", _summary))
main.add_command(LazyCommand("reseal", "service.cli.registry", attribute="rotate_keys"))  # until 0.2.0
