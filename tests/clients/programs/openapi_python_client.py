"""The client that openapi-python-client generates."""

import json
import os
import sys
from io import BytesIO
from pathlib import Path

from gateway_client import AuthenticatedClient
from gateway_client.api.tasks import list_tasks, read_artifact, read_task, submit_upscale
from gateway_client.models import Problem, State, SubmitUpscaleBody, TaskList, UpscaleTask
from gateway_client.types import File

image, output = map(Path, sys.argv[1:])
client = AuthenticatedClient(base_url=os.environ["GATEWAY_URL"], token=os.environ["GATEWAY_TOKEN"])


def body(metadata: str) -> SubmitUpscaleBody:
    file = File(BytesIO(image.read_bytes()), image.name, "image/png")
    return SubmitUpscaleBody(image=file, scale=3, metadata=metadata)


submitted = submit_upscale.sync(client=client, body=body('{"order": "4711"}'), idempotency_key='"python-client"')
assert isinstance(submitted, UpscaleTask)
task = read_task.sync(submitted.id, client=client, prefer="wait")
assert isinstance(task, UpscaleTask)
assert task.state is State.SUCCEEDED
artifact = read_artifact.sync(task.id, task.artifacts[0].name, client=client)
assert isinstance(artifact, File)
output.write_bytes(artifact.payload.read())
problem = submit_upscale.sync(client=client, body=body("no JSON"))
assert isinstance(problem, Problem)
assert problem.errors
listed = list_tasks.sync(client=client, limit=100)
assert isinstance(listed, TaskList)
result = {
    "scale": task.options.scale,
    "order": task.metadata["order"],
    "code": problem.code,
    "fields": [error.field for error in problem.errors],
    "types": sorted({type(item).__name__ for item in listed.items}),
}
print(json.dumps(result))
