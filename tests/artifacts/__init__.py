"""One artifact of each backend, as a version of the run time wrote it; later ones go on loading it.

`python -m tests.artifacts` writes those of the present version, in a directory of its number. They are never written
anew once the version has been released: a change that they do not load with needs another version.
"""
