"""Turns an image of flat colours into an SVG: `python -m service.sandbox.imaging.trace image.png vector.svg`.

A program of its own since vtracer holds the interpreter's lock while it works, which would stop the event loop of the
process that asks.
"""

from __future__ import annotations

import sys

import vtracer

if __name__ == "__main__":
    vtracer.convert_image_to_svg_py(
        sys.argv[1],
        sys.argv[2],
        # The colours are flat already: keep all of their bits apart, and merge no neighbours.
        color_precision=8,
        layer_difference=0,
        filter_speckle=4,
        path_precision=2,
    )
