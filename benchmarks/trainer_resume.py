"""Why the training loop is our own: what transformers' Trainer does where it is killed, and where it should shard.

    python benchmarks/trainer_resume.py

* plain: a run is killed three steps after a checkpoint and resumed; are the weights those of an undisturbed run, bit
  for bit? The same for `secateur.training.trainer.train`.
* sharded: two processes on CPUs are told to shard (FSDP); does a process hold fewer weights than the whole model?
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import keep
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from secateur.data.windows import Windows
from secateur.run_options import RunOptions
from secateur.training.data import LanguageModelling, WindowData
from secateur.training.settings import TrainingSettings
from secateur.training.trainer import TrainingRun, train

TOKENS = torch.randint(0, 128, (64, 16), generator=torch.Generator().manual_seed(1))


def small_model() -> GPT2LMHeadModel:
    """Build a model with dropout, so that the state of random numbers counts."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=32)
    return GPT2LMHeadModel(config)


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 18:
            raise KeyboardInterrupt


def with_transformers(folder: Path, *, kill: bool = False, resume: bool = False, **more: Any) -> Trainer:
    """Train with transformers' Trainer, a checkpoint every five steps."""
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        save_steps=5,
        save_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **more,
    )
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = Trainer(model=small_model(), args=arguments, train_dataset=data, callbacks=[_Kill()] if kill else [])
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def with_ours(folder: Path | None, *, kill: bool = False) -> torch.nn.Module:
    """Train with our loop, which keeps a state after every step here."""
    model, windows, seen = small_model(), Windows.of(TOKENS), []

    def progress(items: Any, _what: object, _total: int) -> Any:
        for item in items:
            seen.append(item)
            if kill and len(seen) == 18:
                raise KeyboardInterrupt
            yield item

    settings = TrainingSettings(batch_size=2, micro_batch=2, save_minutes=1e-9, evaluations=1)
    objective = LanguageModelling(model)
    with contextlib.suppress(KeyboardInterrupt):
        train(
            objective,
            WindowData(windows, range(60)),
            WindowData(windows, range(60, 64)),
            settings,
            TrainingRun(),
            device=torch.device("cpu"),
            options=RunOptions(seed=3, work=folder, progress=progress),
        )
    return model


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit."""
    theirs = dict(other.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in one.named_parameters())


def sharded() -> None:
    """In each of two processes: print the share of the weights that Trainer holds when told to shard."""
    with tempfile.TemporaryDirectory() as name:
        wrap = {"transformer_layer_cls_to_wrap": ["GPT2Block"]}
        trainer = with_transformers(Path(name), fsdp=True, fsdp_config=wrap)
        held = sum(
            one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in trainer.model.parameters()
        )
    whole = sum(one.numel() for one in small_model().parameters())
    print(f"share {held / whole:.2f}")


def main() -> None:
    """Measure, print and keep."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = with_transformers(folder / "a").model
        with_transformers(folder / "b", kill=True)
        again = with_transformers(folder / "b", resume=True).model
        ours = with_ours(None)
        with_ours(folder / "c", kill=True)
        found: dict[str, Any] = {"Trainer resumes to the bit": same(whole, again)}
        found["ours resumes to the bit"] = same(ours, with_ours(folder / "c"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, "sharded"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shares = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("share ")]
    found["share of the weights in each of two processes, Trainer told to shard on CPUs"] = shares
    keep("trainer_resume", {"steps": 32, "killed after": 18}, found)


if __name__ == "__main__":
    sharded() if sys.argv[1:] == ["sharded"] else main()
