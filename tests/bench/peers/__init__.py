"""The peers that `make bench` runs beside the gateway.

| file | content |
| --- | --- |
| `servers.py` | servers as processes on one CPU: the stub, nginx as plain proxy, nginx with Lua, FastAPI with httpx |
| `stub.c` | a stub of the vendor that is no bottleneck |
| `nginx_proxy.conf`, `nginx_lua.conf`, `gateway.lua` | the two nginx |
| `fastapi_app.py` | the FastAPI gateway |
| `tools.py` | required programs, and the versions of all participants |
"""
