"""The client that openapi-generator generates for Python."""

import json
import os
import sys
from pathlib import Path

from openapi_client import ApiClient, Configuration, Problem, State, TasksApi, UpscaleTask
from openapi_client.exceptions import UnprocessableEntityException

image, output = map(Path, sys.argv[1:])
configuration = Configuration(host=os.environ["GATEWAY_URL"], access_token=os.environ["GATEWAY_TOKEN"])
tasks = TasksApi(ApiClient(configuration))
file = (image.name, image.read_bytes())
submitted = tasks.submit_upscale('"openapi-generator"', image=file, scale=3, metadata='{"order": "4711"}')
task = tasks.read_task(submitted.id, prefer="wait").actual_instance
assert isinstance(task, UpscaleTask)
assert task.state is State.SUCCEEDED
output.write_bytes(tasks.read_artifact(task.id, task.artifacts[0].name))
problem = None
try:
    tasks.submit_upscale(image=file, metadata="no JSON")
except UnprocessableEntityException as error:
    problem = error.data
assert isinstance(problem, Problem)
assert problem.errors
result = {
    "scale": task.options.scale,
    "order": task.metadata["order"],
    "code": problem.code,
    "fields": [error.var_field for error in problem.errors],
    "types": sorted({type(item.actual_instance).__name__ for item in tasks.list_tasks(limit=100).items}),
}
print(json.dumps(result))
