"""Check of the production image: built with Debian's buildah, run confined, through the main job (`make image-check`).

It needs no container engine and no image registry: debootstrap makes the base image on the machine.
"""
