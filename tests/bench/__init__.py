"""What things cost, measured on real servers.

`make bench` compares the whole gateway with what a team would run instead and writes `results/`; `make bench-quick`
does the main rows. `make bench ARGS="NAME..."` runs single benchmarks, `make bench ARGS="--rows NAME,..."` some of the
workloads; with `--against DIR` the gateway of another checkout takes part in the same rounds.

The comparison:

    workloads.py      the workloads by name, in their order
    closed_loops.py   reads and submissions, each connection without a pause; a slow vendor
    bursts.py         large uploads at the same moment, clients that wait, overload
    running_tasks.py  thousands of running tasks: the poller, reads, lists, and what callers get beside it
    upkeep.py         scrapes, the start, and doing nothing
    gateways.py       the gateway in production mode, its environment, and the servers to compare
    peers/            the vendor's stand-in, the references, and processes pinned to a CPU
    load.py, wrk.lua  requests, and the load generators
    images.py         PNGs of random pixels
    comparison.py     a run: CPUs, rounds, results
    report.py         tables, JSON and the results file
    plot.py           the picture
    results/          the results of a run

The single benchmarks, each an asynchronous function without arguments that returns figures:

    figures.py        a figure with its target, and the table of them
    house.py          a ledger on a server of its own, with a tenant at work
    ledger.py         the time the server takes for each script, and the round trips
    memory.py         the memory a finished task takes
    gateway.py        a gateway as a process, with a store and an upstream of its own
    upstream.py       an upstream that costs next to nothing, and measures how late checks are
    waiting.py        thousands of clients that wait: their memory, and how soon they get the end
    watching.py       thousands of running tasks that are watched: the time of a core, and how late that is
    scraping.py       scrapes of many tenants, and what metrics and logs add to a request

A target that is missed fails nothing: times depend on the machine and on what else it does.
"""
