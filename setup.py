"""Adds what pyproject.toml cannot express: the service requires the client of the same version."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "lorry/__init__.py").read_text("utf-8"), re.MULTILINE)[0]
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]

setup(version=VERSION, install_requires=[f"lorry=={VERSION}", *GROUPS["server"]])
