"""The command `gateway`."""

from __future__ import annotations

import click

from service import __version__
from service.cli.common import FieldErrorGroup, LazyCommand, RoleCommand

_COMMANDS = {
    "submit": ("submit", "Submit images: `gateway submit upscale photo.jpg --wait -o out.png`."),
    "tasks": ("callers", "List your tasks, newest first."),
    "download": ("download", "Fetch the results of your tasks."),
    "completion": ("completion", "Print the script that completes commands in bash, zsh or fish."),
    "account": ("admin", "Manage accounts at the upstream."),
    "tenant": ("admin", "Manage tenants, which submit tasks."),
    "token": ("admin", "Manage the bearer tokens of tenants."),
    "webhook": ("usage", "Manage webhooks, which report finished tasks and used limits to tenants."),
    "clock": ("admin", "Manage the clock of the ledger."),
    "report": ("usage", "Show what each tenant spent in a month, and write it as CSV."),
    "refund": ("usage", "Return the cost of ID, a task or a submission, to its tenant's limits, once."),
    "export": ("registry", "Print the registry as TOML: accounts, tenants and tokens."),
    "apply": ("registry", "Change the registry to match FILE, and show the differences."),
    "rotate-keys": ("registry", "Encrypt all secrets of the registry with the first of GATEWAY_SECRET_KEYS."),
    "top": ("top", "Show what gateways do, live: requests, tasks, balances, denials."),
    "serve": ("serve", "Run the gateway until SIGINT or SIGTERM."),
    "check-config": ("check_config", "Print the effective settings, or all their errors, and start nothing."),
    "sandbox": ("dev", "Run a stand-in for the upstream: the vendor's API with real image processing."),
    "demo": ("dev", "Submit an image of each kind to a running gateway, and check the results."),
    "openapi": ("dev", "Write the OpenAPI documents of both ports."),
}
_ROLE_COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "quota": ("Show your limits and their use; of operators those of TENANT.", ()),
    "usage": ("Show your tasks and spending; of operators those of all tenants.", ()),
    "task": ("Show your task ID; of operators the tasks of tenants.", ("show", "list")),
    "submission": ("Show the outcome of the submission ID.", ()),
}
"""Commands of operators and callers, with the operators' subcommands: the token that is set decides."""
_ROLE_MODULES = {"operator": "service.cli.usage", "caller": "service.cli.callers"}


@click.group(cls=FieldErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """The Imaging Gateway: tenants, quota and exact spending in front of a paid image API."""


for _name, (_module, _summary) in _COMMANDS.items():
    main.add_command(LazyCommand(_name, f"service.cli.{_module}", _summary))
for _name, (_summary, _subcommands) in _ROLE_COMMANDS.items():
    main.add_command(RoleCommand(_name, _ROLE_MODULES, _summary, _subcommands))
main.add_command(LazyCommand("reseal", "service.cli.registry", attribute="rotate_keys"))  # until 0.2.0
