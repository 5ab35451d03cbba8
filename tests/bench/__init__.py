"""Benchmarks on real servers.

`make bench` compares the whole gateway with what a team would run instead and writes `results/`; `make bench-quick`
measures the main rows. `make bench ARGS="NAME..."` runs single benchmarks, `make bench ARGS="--rows NAME,..."` some of
the workloads; with `--against DIR` the gateway of another checkout takes part in the same rounds.

The comparison:

    workloads.py      the workloads by name, in their order
    closed_loops.py   reads and submissions in closed loops; a slow vendor
    bursts.py         simultaneous large uploads, waiting clients, overload
    running_tasks.py  thousands of running tasks: the poller, reads, lists, and requests beside it
    upkeep.py         scrapes, start, idling
    candidates.py     the gateway in production mode, its environment, and the servers to compare
    peers/            the vendor's stub, the references, and processes pinned to a CPU
    load.py, wrk.lua  requests, and the load generators
    images.py         PNGs of random pixels
    comparison.py     a run: CPUs, rounds, results
    report.py         tables, JSON and the results file
    plot.py           the plot
    results/          the results of a run

The single benchmarks, each an asynchronous function without arguments that returns figures:

    figures.py        a figure with its target, and the table of them
    busy_tenant.py    a ledger on a server of its own, with a tenant at its limits
    ledger.py         server time and round trips of each script
    memory.py         memory of a finished task
    gateway.py        a gateway process with a store and an upstream of its own
    upstream.py       a minimal upstream that measures the lateness of checks
    waiting.py        thousands of waiting clients: memory and latency
    polling.py        thousands of polled tasks: CPU time and lateness
    scraping.py       scrapes of many tenants, and the overhead of metrics and logs

A missed target fails nothing: times depend on the machine and its load.
"""
