"""Packages that only some flags need, looked for before the work."""

import importlib.util

REPORT_PACKAGES = ("matplotlib", "seaborn")
PIP_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # where a package is installed by another name


def check_packages(what, *modules):
    """Raise ValueError, with the name to install, where one of `modules`, which `what` needs, is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            name = PIP_NAMES.get(module, module)
            raise ValueError(f"{what} needs {name}, which is missing: pip install {name}")
