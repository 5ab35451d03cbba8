"""What the demo asks for: one picture and its options for each kind of task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources


@dataclass(frozen=True, slots=True)
class Job:
    kind: str
    picture: str
    """Name of a file in `pictures`, fit for the kind."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Form fields that go with the picture."""

    def read(self) -> bytes:
        return resources.files("service.demo").joinpath("pictures", self.picture).read_bytes()


JOBS = (
    Job("upscale", "photo.jpg", {"scale": "2"}),
    Job("vectorize", "logo.png", {"colors": "5"}),
    Job("face-enhance", "face.jpg"),
    Job("seamless", "texture.jpg", {"fit": "0.5"}),
)
