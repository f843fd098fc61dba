"""Two processes on CPUs (gloo) measure and train what one does: data parallel, and with weights divided (FSDP2)."""

import os
import socket
from pathlib import Path

import pytest
import torch
import two_processes

from tiny_models import save_tiny

SCRIPT = Path(two_processes.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory, warm_python):
    """What one process finds, this one; and two, and two that share the weights, started at once."""
    folder = tmp_path_factory.mktemp("processes")
    model = save_tiny("llama", folder / "model")
    commands, environments = [], []
    for kind in ("two", "sharded"):
        fsdp = {"ACCELERATE_USE_FSDP": "true"} if kind == "sharded" else {}
        for variables in launched():
            commands.append([SCRIPT, model, folder / f"{kind}.pt", kind])
            environments.append(os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables | fsdp)
    done = warm_python.run_together(commands, environments)
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    two_processes.main(str(model), str(folder / "one.pt"), "one")
    return {kind: torch.load(folder / f"{kind}.pt") for kind in ("one", "two", "sharded")}


def launched():
    """Return the environment that a launcher gives each of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def test_statistics_are_those_of_one_process(found):
    assert [found[kind]["processes"] for kind in ("one", "two", "sharded")] == [1, 2, 2]
    one, two = found["one"]["statistics"], found["two"]["statistics"]
    for name in ("cosine", "angular", "cka_linear", "cka_rbf", "relative_magnitude"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)
    for name in ("replaceme", "slicegpt", "auto"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "by"), [("two", "full"), ("two", "lora"), ("sharded", "full")])
def test_training_is_that_of_one_process(kind, by, found):
    one, several = found["one"][by], found[kind][by]
    assert len(one["curve"]) == 20
    torch.testing.assert_close(several["curve"], one["curve"], rtol=0, atol=1e-4)
    assert one["weights"].keys() == several["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], weight, rtol=0, atol=1e-4)


def test_the_weights_really_are_divided(found):
    assert found["sharded"]["shards"]
    assert all(local <= -(-total // 2) + 32 for total, local in found["sharded"]["shards"])
    whole, local = (sum(column) for column in zip(*found["sharded"]["shards"], strict=True))
    assert local < 0.55 * whole
