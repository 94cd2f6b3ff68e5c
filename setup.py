"""All metadata stands in pyproject.toml. This file is where the extension of csrc/ is declared; there is nothing to compile yet."""

from setuptools import setup

setup()
