"""The check of a release: the wheel is built, looked at, and installed far from the checkout, where it has to serve.

    make release-check

What is published is what was checked: the wheel is left in dist/.
"""
