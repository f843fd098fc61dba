"""Upload a finished checkpoint folder to the Hub, after completing its card."""

from __future__ import annotations

import glob
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from secateur.checkpoints.card import RELATION, methods_in, opened_from, with_results
from secateur.checkpoints.folders import MARKER, is_ours, read_record
from secateur.errors import InputError, ModelError, SecateurWarning, first_line
from secateur.evaluation.results import read_results
from secateur.models import fingerprint
from secateur.models.fetch import HUB_NAME
from secateur.models.shard_files import open_shard, shard_files

_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the model card should say that the folder does not know.

    Attributes:
        results: a `results.jsonl` of this checkpoint (or its folder), to be shown on the card.
        base_model: name of the dense model on the hub, where the card does not know it.
    """

    results: str | Path | None = None
    base_model: str | None = None


NO_FACTS = CardFacts()


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    card: CardFacts = NO_FACTS,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload a checkpoint folder that secateur wrote and checked to the Hugging Face Hub.

    The repository is created if necessary. The card in the folder (`README.md`) is completed first with base model,
    tags and results; the rest of its text is kept.

    Args:
        folder: what `save`, `prune` or `heal` wrote.
        repo: name on the hub, `owner/name`.
        private: make a new repository a private one; one that is there already stays as it is.
        revision: branch to upload to, made if it is not there; None is `main`.
        token: token that may write; None takes the one that `hf auth login` or `HF_TOKEN` left.
        message: the commit's.
        card: what the card should say besides: results, the dense model's name.
        dry_run: only say what would go; nothing is written or sent.

    Returns:
        `repo`, `revision`, `private`, `files` (bytes by name), total `bytes`, and `url` of the commit, None for a dry
        run.

    Raises:
        InputError: the folder is not a finished checkpoint written by secateur, an invalid name, results of another
            model, or the Hub refuses the upload.
    """
    folder = Path(folder)
    record = _finished(folder)
    _check_names(repo, card.base_model)
    page = _card(folder, record, repo, card)
    files = {name: size for name, size in _files(folder).items() if name != _CARD}
    files[_CARD] = len(str(page).encode())
    summary: dict[str, Any] = {
        "repo": repo,
        "revision": revision,
        "private": private,
        "files": dict(sorted(files.items())),
        "bytes": sum(files.values()),
        "url": None,
    }
    if dry_run:
        return summary
    page.save(folder / _CARD)
    summary["url"] = _upload(HfApi(), folder, summary, token, message or _message(record))
    return summary


def _finished(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint that may be published.

    Raises:
        InputError: not written by secateur, not a checkpoint, never checked, or weights missing or truncated.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder.")
    if not is_ours(folder):
        raise InputError(f"{folder}: not written by secateur ({MARKER} is missing); push what prune or heal wrote.")
    record = read_record(folder)
    if "history" not in record:
        raise InputError(
            f"{folder}: holds what `secateur {record.get('command', 'another command')}` wrote, not a checkpoint; "
            "push the folder of a model, such as cut/ or healed/."
        )
    try:
        methods_in(record["history"])
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MARKER}: not a record of this version; write the folder again.") from error
    if not (record.get("check") or {}).get("passed"):
        raise InputError(
            f"{folder}: did not pass the check in a fresh process, or skipped it, so it may not load; "
            "run prune or heal again without --no-check."
        )
    try:
        for shard in shard_files(folder):
            with open_shard(shard):
                pass
    except ModelError as error:
        raise InputError(f"{error} Nothing was sent; write the folder again.") from error
    return record


def _check_names(repo: str, base_model: str | None) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo}: not a valid name on the Hub ({first_line(error)}); write owner/name.") from error
    if not HUB_NAME.fullmatch(repo):
        raise InputError(f"{repo}: the owner is missing; write owner/name.")
    if base_model is not None and not HUB_NAME.fullmatch(base_model):
        raise InputError(f"--base-model {base_model}: give the dense model's name on the Hub, owner/name.")


def _card(folder: Path, record: dict[str, Any], repo: str, facts: CardFacts) -> ModelCard:
    """Complete the folder's card: what a person wrote on it stays."""
    readme = folder / _CARD
    text = readme.read_text(encoding="utf-8") if readme.is_file() else f"---\n---\n\n# {repo.split('/')[1]}\n"
    card = ModelCard(opened_from(text, repo), ignore_metadata_errors=True)
    data: Any = card.data
    data.library_name = data.library_name or "transformers"
    data.tags = list(dict.fromkeys([*(data.tags or []), "secateur", "pruned", *methods_in(record["history"])]))
    data.base_model = facts.base_model or data.base_model
    if data.base_model and "base_model_relation" not in data:
        data["base_model_relation"] = RELATION
    for missing, what in (("license", "licence"), ("base_model", "base model (--base-model)")):
        if not getattr(data, missing, None):
            advice = f"{readme}: the card names no {what}; add it for those who find the model."
            warnings.warn(advice, SecateurWarning, stacklevel=3)
    if facts.results is None:
        return card
    found = read_results(facts.results)
    ours = fingerprint.of_folder(folder)
    if not found or any(one.fingerprint != ours for one in found if one.role == "model"):
        raise InputError(f"{facts.results}: measured on another model than {folder}; give the results of this one.")
    return with_results(card, found, repo.split("/")[1])


def _files(folder: Path) -> dict[str, int]:
    """Return the files to upload, with their sizes: everything but hidden files and folders."""
    found = (file for file in folder.rglob("*") if file.is_file())
    named = {file.relative_to(folder): file.stat().st_size for file in found}
    return {name.as_posix(): size for name, size in named.items() if not any(p.startswith(".") for p in name.parts)}


def _message(record: dict[str, Any]) -> str:
    return f"{', '.join(methods_in(record['history'])) or 'unchanged'}, by secateur {record['secateur']}"


def _upload(api: HfApi, folder: Path, summary: dict[str, Any], token: str | None, message: str) -> str:
    repo, revision = summary["repo"], summary["revision"]
    try:
        api.create_repo(repo, private=summary["private"], exist_ok=True, token=token)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True, token=token)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[glob.escape(name) for name in summary["files"]],
            token=token,
        )
    except OfflineModeIsEnabled as error:
        raise InputError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.") from error
    except (HTTPError, OSError) as error:
        raise InputError(
            f"{repo}: the Hub refused the upload ({first_line(error)}). Log in with `hf auth login`, or set HF_TOKEN "
            "to a token that may write there; the same command resumes where it stopped."
        ) from error
    return str(commit.commit_url)
