"""The release of this package: a module of its own, so that any stage may name it."""

__version__ = "0.1.0"
