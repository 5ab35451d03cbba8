"""`python -m service` is the command `gateway`."""

from service.cli import main

main()
