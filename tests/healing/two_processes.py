"""What two processes compute together, for `test_processes.py` to hold against what one computes."""

import sys
from pathlib import Path

import torch

from secateur import heal, make_plan, open_model, prune, score
from secateur.data.windows import Windows
from secateur.distributed import is_main_process, process_count
from secateur.run_options import RunOptions
from secateur.training import sharding
from secateur.training import trainer as loop


def windows_of(count, padded):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 256, (count, 16), generator=generator)
    mask = torch.arange(16) < torch.randint(8, 17, (count, 1), generator=generator)
    return Windows.of(tokens, mask if padded else None)


def statistics(folder, work):
    decoder, windows = open_model(folder), windows_of(7, padded=True)
    scores = score(decoder, texts=windows)
    found = {name: torch.tensor(getattr(scores, name)) for name in ("cosine", "angular", "cka_linear", "cka_rbf")}
    found["relative_magnitude"] = torch.tensor(scores.relative_magnitude)
    for method, amount in {"replaceme": {"blocks": 2}, "slicegpt": {"slice": 0.25}}.items():
        pruned = prune(decoder, make_plan(decoder, method=method, **amount, texts=windows), texts=windows)
        # eigenvectors are unique but for nearly equal eigenvalues; what the model answers is
        with torch.no_grad():
            found[method] = pruned.module(windows.tokens).logits
    settings = {"depth": "none,shortgpt", "width": "none,obs-width", "trials": 5}
    for _ in range(2):  # the second time nothing is measured
        plan = make_plan(
            decoder, method="auto", remove=0.3, texts=windows, settings=settings, options=RunOptions(work=work)
        )
    found["auto"] = torch.tensor([one.loss for one in plan.search.candidates if one.loss is not None])
    return found


def training(folder, by, work):
    decoder = open_model(folder)
    settings = {"batch_size": 4, "micro_batch": 1, "learning_rate": 1e-3, "evaluations": 2, "clip": 0.5}
    healed = heal(decoder, by=by, texts=windows_of(84, padded=True), settings=settings, options=RunOptions(work=work))
    curve = [entry["loss"] for entry in healed.history[-1]["healing"]["curve"] if "loss" in entry]
    return {"curve": torch.tensor(curve), "weights": dict(healed.module.named_parameters())}


def main(folder, out, kind):
    shards = []
    if kind == "sharded":
        plain = sharding.shard

        def watched(module, units):
            plain(module, units)
            shards.extend((p.numel(), p.to_local().numel()) for p in module.parameters())

        loop.shard = watched
    found = {"processes": process_count(), "full": training(folder, "full", Path(out).parent / f"{kind}-full")}
    if kind != "sharded":
        found["statistics"] = statistics(folder, Path(out).parent / f"{kind}-search")
        found["lora"] = training(folder, "lora", Path(out).parent / f"{kind}-lora")
    found["shards"] = shards
    if is_main_process():
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
