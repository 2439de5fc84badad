"""`impasto push`: share an artifact on the Hugging Face hub, with a card that says what it is and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from impasto.cli.console import RichReporter, emit, size
from impasto.cli.options import Json


def push(
    source: Annotated[Path, typer.Argument(
        metavar="RUN_OR_FILE", help="A run's directory, an adapter, or a diffusers folder.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; it is made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    card: Annotated[Path | None, typer.Option(
        "--card", metavar="FILE", help="A model card of your own, Markdown, in place of ours.")] = None,
    base_model: Annotated[str | None, typer.Option(
        "--base-model", metavar="OWNER/NAME", help="The base's name on the hub, where the file does not tell.")] = None,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Push nothing: write what would go up to a folder.")] = False,
    out: Annotated[Path | None, typer.Option(
        "-o", "--out", metavar="DIR", help="That folder; default: NAME-push, here.")] = None,
    as_json: Json = False,
) -> None:
    """Share an adapter or a checkpoint on the Hugging Face hub, with its card and sample pictures.

    The card is written from the artifact's own metadata. The token is the hub's: HF_TOKEN, or hf auth login.
    """
    if out is not None and not dry_run:
        raise typer.BadParameter("belongs to --dry-run", param_hint="'-o'")
    for option, value in (("OWNER/NAME", repo), ("--base-model", base_model)):
        if value is not None:
            _check(value, option)
    from impasto.training.sharing.card import write_card
    from impasto.training.sharing.hub import check_access
    from impasto.training.sharing.hub import push as send
    from impasto.training.sharing.parcel import pack, size_of, write_folder

    if not dry_run:
        check_access(repo)
    own = _read(card) if card is not None else None
    report = RichReporter()
    parcel = pack(source)
    files = parcel.with_card(write_card(parcel, repo, base_model) if own is None else own)
    url = folder = None
    if dry_run:
        folder = out or Path(f"{repo.partition('/')[2]}-push")
        write_folder(files, folder)
    else:
        url = send(files, repo, private=private, report=report)
    if as_json:
        emit({"repository": repo, "url": url, "private": private, "folder": folder and str(folder),
              "files": [{"path": place, "bytes": size_of(content)} for place, content in files.items()]})
        return
    for place, content in files.items():
        print(f"{size(size_of(content)):>9}  {place}")
    print(url if folder is None else f"nothing was pushed; what would go to {repo} is in {folder}")


def _check(name: str, option: str) -> None:
    from impasto.core.errors import UserError
    from impasto.training.sharing.repository import repository

    try:
        repository(name)
    except ValueError as error:
        raise UserError(f"{name!r} {error}", where=option) from None


def _read(card: Path) -> str:
    """The user's own card."""
    from impasto.core.errors import UserError

    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as a card ({error})", where=card) from None
