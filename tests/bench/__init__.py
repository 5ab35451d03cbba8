"""Benchmarks on real servers.

`make bench` compares the whole gateway with what a team would run instead and writes `results/`; `make bench-quick`
measures the main rows. `make bench ARGS="NAME..."` runs single benchmarks, `make bench ARGS="--rows NAME,..."` some of
the workloads; with `--against DIR` the gateway of another checkout takes part in the same rounds.

The comparison:

    workloads.py      the workloads by name, in their order; closed loops, large uploads, waiting clients, overload
    upkeep.py         workloads with thousands of running tasks; scrapes, start, idling
    comparison.py     a run: CPUs, rounds, results; the servers to compare and their environment
    peers/            the vendor's stub, the references, and processes pinned to a CPU
    load.py, wrk.lua  requests, PNGs of random pixels, and the load generators
    report.py         tables, JSON, the results file and the plot
    results/          the results of a run

The single benchmarks, each an asynchronous function without arguments that returns figures:

    ledger.py         server time and round trips of each script, memory of a finished task
    gateway.py        a process with thousands of waiting clients, polled tasks, or scrapes of many tenants
    upstream.py       a minimal upstream that measures the lateness of checks

A missed target fails nothing: times depend on the machine and its load.
"""
