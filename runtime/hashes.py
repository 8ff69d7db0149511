"""Hashes of the files behind a network, weights or a data set, by which results that were measured before are found."""

import hashlib
import json
import os
from functools import cache

from runtime.files import check_regular

CHUNK = 2**20  # bytes that are hashed at a time


@cache
def contents(text):
    """A network, weights or a data set as a key has it: hashes stand for files, so that they may move.

    A folder of images counts with the names and sizes of its files. Code counts with its file alone. A name, as of a
    network of a package, stands for itself.
    """
    file, colon, name = text.rpartition(".py:")
    if colon:
        return f"{hash_file(file + '.py')}:{name}"
    if os.path.isdir(text):
        return hash_folder(text)
    return hash_file(text) if os.path.exists(text) else text


def hash_file(path):
    """SHA-256 of a file, as hexadecimal text. Raises OSError for a missing file, a pipe or a device."""
    check_regular(path)
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def hash_folder(path):
    """SHA-256 of the names and sizes of all files in a folder and below it, as hexadecimal text."""
    sizes = {}
    for folder, _, files in os.walk(path):
        for name in files:
            file = os.path.join(folder, name)
            sizes[os.path.relpath(file, path)] = os.path.getsize(file)
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()
