"""What things cost, measured on real servers: `make bench`, or `python -m tests.bench NAME...` for some of it.

    __main__.py     names the benchmarks, runs them and prints their figures
    figures.py      a figure with its target, and the table of them
    house.py        a ledger on a server of its own, with a tenant at work; what the server says of itself
    ledger.py       the time the server takes for each script, and the round trips
    memory.py       the memory a finished task takes
    gateway.py      a gateway as a process, with a store and an upstream of its own
    upstream.py     an upstream that costs next to nothing, and tells how late it is asked
    waiting.py      thousands of clients that wait: their memory, and how soon they are told
    watching.py     thousands of running tasks that are watched: the time of a core, and how late that is

A benchmark is an asynchronous function without arguments that gives figures. A target that is missed fails nothing:
times depend on the machine and on what else it does.
"""
