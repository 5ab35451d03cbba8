"""The peers that `make bench` runs beside the gateway.

| file | content |
| --- | --- |
| `tools.py` | required programs, and the versions of all participants |
| `processes.py` | servers as processes on one CPU: start, CPU time, memory, end |
| `stub.c`, `stub.py` | a stub of the vendor that is no bottleneck |
| `references.py` | what a team would run instead: nginx as plain proxy, nginx with Lua, FastAPI with httpx |
| `nginx_proxy.conf`, `nginx_lua.conf`, `gateway.lua` | the two nginx |
| `fastapi_app.py` | the FastAPI gateway |
"""
