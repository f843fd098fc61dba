"""States kept in memory or on disk: the same either way, and nothing left behind."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from secateur.calibration.store import StateStore

KIB = torch.arange(256, dtype=torch.float32)  # 1024 bytes


def files(store):
    return [] if store._folder is None else sorted(store._folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0, 1 << 20], ids=["disk", "memory"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (7,), (1, 1), ()])
def test_gives_back_what_was_put(dtype, budget, shape):
    tensor = torch.randn(shape).to(dtype)
    with StateStore(budget) as store:
        store.put("key", tensor)
        found = store.get("key")
        assert bool(files(store)) == (budget == 0)
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor)


def test_a_view_and_a_gradient_survive_the_disk():
    tensor = torch.randn(6, 4, requires_grad=True)
    with StateStore(0) as store:
        store.put("view", tensor.t()[1:3])
        assert torch.equal(store.get("view"), tensor.t()[1:3])
        assert not store.get("view").requires_grad


def test_nan_and_infinity_survive_the_disk():
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-38])
    with StateStore(0) as store:
        store.put("odd", tensor)
        assert torch.equal(store.get("odd").nan_to_num(7), tensor.nan_to_num(7))


def test_the_budget_decides_what_stays_in_memory():
    with StateStore(2048) as store:
        for number in range(4):
            assert store.has_room(KIB) == (number < 2)
            store.put(number, KIB + number)
        assert len(files(store)) == 2
        assert all(torch.equal(store.get(number), KIB + number) for number in range(4))
        store.drop(0)
        assert store.has_room(KIB)
        store.put(4, KIB)
        assert len(files(store)) == 2


def test_putting_again_replaces():
    for budget in (0, 1024):
        with StateStore(budget) as store:
            for number in range(5):
                store.put("same", KIB + number)
                assert torch.equal(store.get("same"), KIB + number)
            assert list(store.keys()) == ["same"]
            assert len(files(store)) == (budget == 0)
            assert not store.has_room(KIB)


def test_room_is_given_back():
    with StateStore(1024) as store:
        for _ in range(3):
            store.put("key", KIB)
            store.drop("key")
        assert store.has_room(KIB)
        assert not store.has_room(torch.cat([KIB, KIB]))
        assert files(store) == []


def test_keys_and_membership():
    with StateStore(1024) as store:
        store.put((0, 1, ()), KIB)
        store.put((1, 1, (2,)), KIB)
        assert set(store.keys()) == {(0, 1, ()), (1, 1, (2,))}
        assert (0, 1, ()) in store
        assert (1, 1, (2,)) in store
        assert (2, 1, ()) not in store
        for key in store.keys():  # noqa: SIM118 - not a dict; dropping while walking is allowed
            store.drop(key)
        store.drop("never put")
        assert not list(store.keys())
        with pytest.raises(KeyError):
            store.get((0, 1, ()))


def test_nothing_is_left_on_disk():
    with StateStore(0) as store:
        store.put("a", KIB)
        store.put("b", KIB)
        (first, second) = files(store)
        folder = first.parent
        store.drop("a")
        assert files(store) == [second]
    assert not folder.exists()
    assert not list(store.keys())


def test_nothing_is_left_on_disk_after_an_error():
    folders = []

    def fail():
        with StateStore(0) as store:
            store.put("a", KIB)
            folders.append(store._folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not folders[0].exists()


def test_a_closed_store_can_be_used_again():
    with StateStore(0) as store:
        store.put("a", KIB)
        store.close()
        store.put("a", KIB + 1)
        assert torch.equal(store.get("a"), KIB + 1)


def test_the_default_budget_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=4096))
    with StateStore() as store:
        assert store.budget == 1024


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with StateStore(0) as store:
        with pytest.raises(OSError, match="TMPDIR"):
            store.put("a", KIB)
        assert files(store) == []
