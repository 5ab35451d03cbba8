"""The command `completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_PROGRAM, _VARIABLE = "gateway", "_GATEWAY_COMPLETE"
_HELP = """Print the script that completes commands and options in a shell.

\b
bash  eval "$(gateway completion bash)"       in ~/.bashrc
zsh   eval "$(gateway completion zsh)"        in ~/.zshrc, after compinit
fish  gateway completion fish | source        in ~/.config/fish/config.fish
"""


@click.command(help=_HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    found = get_completion_class(shell)
    if found:
        click.echo(found(click.Command(_PROGRAM), {}, _PROGRAM, _VARIABLE).source())
