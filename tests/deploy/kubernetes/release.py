"""Rendered releases of the chart, and the environment of their pods."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from deploy.helm.chart import EXAMPLES, Resource, render

ROLES = ("api", "worker")
RELEASES = tuple(EXAMPLES)
REDIS_URL = "rediss://gateway:pass@redis.example:6380"
"""The Redis URL in the Secret of each release."""


@cache
def render_release(name: str, *settings: str) -> Sequence[Resource]:
    """Render an example, overridden by `settings` such as `api.replicas=3`."""
    return render(EXAMPLES[name], *settings)


def resources_of_kind(resources: Sequence[Resource], expected: str) -> Sequence[Resource]:
    return [resource for resource in resources if resource["kind"] == expected]


def get_resource(resources: Sequence[Resource], expected: str, suffix: str = "") -> Any:
    """Return the resource of a kind that is named after the release, with a suffix."""
    (resource,) = [
        item
        for item in resources_of_kind(resources, expected)
        if item["metadata"]["name"] == f"photos-imaging-gateway{suffix}"
    ]
    return resource


def pod_templates(resources: Sequence[Resource]) -> Iterator[tuple[str, Any]]:
    """Yield the pod templates with the names of their owners."""
    for resource in resources:
        if "template" in resource.get("spec", {}):
            yield resource["metadata"]["name"], resource["spec"]["template"]


def matches_selector(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether labels match a selector; an empty selector is a mistake and matches nothing."""
    return bool(selector) and selector.items() <= labels.items()


def pod_environment(pod: Any, folder: Path) -> Mapping[str, str]:
    """Return a container's environment, with generated secrets mounted below `folder`."""
    made_up = {
        "redis-url": REDIS_URL,
        "secret-keys": base64.b64encode(secrets.token_bytes(32)).decode(),
        "admin-token": secrets.token_hex(32),
        "metrics-token": secrets.token_hex(32),
    }
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounted = {
        f"{mount['mountPath']}/{item['path']}": made_up[item["path"]]
        for mount in container["volumeMounts"]
        for source in volumes[mount["name"]].get("projected", {}).get("sources", ())
        for item in source["secret"]["items"]
    }
    results = {}
    for item in container["env"]:
        value = item.get("value", "from a Secret")
        if value in mounted:
            file = folder / Path(value).name
            file.write_text(f"{mounted[value]}\n")
            value = str(file)
        results[item["name"]] = value
    return results
