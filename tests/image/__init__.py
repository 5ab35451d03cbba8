"""The check of the production image: built with Debian's buildah, started confined, put to the gateway's main job.

It takes no container engine and no registry of images: the base is made on the machine by debootstrap.

    __main__      builds, then goes into a cell
    host          what the machine has to offer
    buildah       the base, the build, an image's configuration and tree
    rootfs_check  what may be in the image
    sandbox_ns    namespaces of the check's own, in which nothing of the machine is touched and nothing survives
    container     the image's tree and configuration, run as an engine would
    smoke_test    what is done inside the namespaces
    report        one line per check
"""
