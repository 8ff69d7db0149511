"""Checks, before the work, for packages that only some flags need."""

import importlib.util

REPORT_PACKAGES = ("matplotlib", "seaborn")
PIP_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # modules whose package has another name


def check_packages(what, *modules):
    """Raise ValueError, with the package to install, if one of `modules` is missing. what: the flag that needs them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            name = PIP_NAMES.get(module, module)
            raise ValueError(f"{what} needs {name}, which is missing: pip install {name}")
