"""Check of the production image: built with Debian's buildah, run confined, through the main job.

It needs no container engine and no image registry: debootstrap makes the base image on the machine.

    __main__      builds the image, then enters new namespaces
    host          requirements of the machine
    buildah       base image, build, configuration and files
    rootfs_check  allowed files
    sandbox_ns    namespaces in which nothing of the machine is changed and nothing survives
    container     runs the image as an engine would
    smoke_test    the checks inside the namespaces
    report        one line per check
"""
