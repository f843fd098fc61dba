"""For all tests: offline, one thread, and models that are opened or written once."""

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from transformers.utils import logging

from secateur.checkpoints import check
from secateur.models.opening import open_model
from tiny_models import VOCABULARY, save_tiny
from warm import WarmPython

torch.set_num_threads(1)
torch.cpu._is_amx_tile_supported = lambda: False  # float32 on every machine, also where bfloat16 is fast
logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def warm_python():
    """Return what runs a command in a fresh process that starts at once."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture(scope="session", autouse=True)
def _checks_start_at_once(warm_python):
    """Let saved folders reopen in such a process; `test_save.py` starts a real one."""

    def run(command):
        done = warm_python.run(*command[1:])
        return done.returncode, done.stdout, done.stderr

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_run", run)
        yield


@pytest.fixture(scope="session")
def bundled():
    """The trained 12-block model that ships with the package."""
    return open_model("bundled")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Return the checkpoint folder of a tiny model, written once; to be read only."""

    @functools.cache
    def folder(name, **settings):
        return save_tiny(name, tmp_path_factory.mktemp(name), **settings)

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """Return a tiny model opened once, in memory or as a skeleton; not to be changed."""

    @functools.cache
    def decoder(name, *, skeleton=False, **settings):
        return open_model(tiny_folder(name, **settings), skeleton=skeleton)

    return decoder


@pytest.fixture(scope="session")
def tiny_with_tokenizer(tmp_path_factory):
    """Return the checkpoint folder of a tiny Llama in bfloat16 that has a tokenizer; to be read only."""
    return str(save_tiny("llama", tmp_path_factory.mktemp("text") / "tiny", dtype=torch.bfloat16, tokenizer=True))


@pytest.fixture(scope="session")
def window_file(tmp_path_factory):
    """Return a file with eight windows of 16 random tokens for tiny models."""
    path = tmp_path_factory.mktemp("windows") / "windows.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, (8, 16)))
    return str(path)
