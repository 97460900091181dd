"""Put a trained model on the Hub: `python -m fox_training.publish OUT --repo user/name`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .commands import command_parser, errors_of_the_user

DESCRIPTION = """\
Upload the model of a run to the Hugging Face Hub, with its card, recipe, measurements and figures, in one commit.

See first:          python -m fox_training.publish runs/demo --repo user/fox-demo --dry-run
Publish:            python -m fox_training.publish runs/demo --repo user/fox-demo --license apache-2.0
Only for yourself:  python -m fox_training.publish runs/demo --repo user/fox-demo --private

Readable without modeling_fox:  ... --with-code    its code goes beside the weights, for trust_remote_code=True

Needs a login (`hf auth login`); --dry-run touches no network. The card is written again from the files of the run,
with the name of the repository in its example. Checkpoints are not uploaded.
"""

# What save_pretrained, the tokenizers and the card write. Anything else in the folder is not ours to publish.
PATTERNS = [
    "README.md",
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.py",
    "recipe.yaml",
    "evaluation.json",
    "figures/*.png",
]


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("publish", DESCRIPTION, "OUT --repo USER/NAME [options]")
    add = parser.add_argument
    add("run", metavar="OUT", type=Path, help="folder of the run (run.output_dir of the recipe)")
    add("--repo", metavar="USER/NAME", required=True, help="repository, made if it does not exist")
    add("--title", metavar="TEXT", help="heading of the card (default: NAME)")
    add("--license", metavar="ID", help="licence of the weights as the Hub names it (default: none is stated)")
    add("--private", action="store_true", help="make the repository private if it does not exist yet")
    add("--with-code", action="store_true", help="put the code of the model beside the weights, in OUT/model too")
    add("--dry-run", action="store_true", help="print what would be uploaded, and the card")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    args = parser().parse_args(argv)
    with errors_of_the_user(parser()):
        publish(args)
    return 0


def publish(args: argparse.Namespace) -> str | None:
    """Write the card and upload OUT/model. Returns the address of the commit, None for a dry run.

    Raises:
        ValueError: If the run is incomplete, the name is not one of the Hub, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    from fox_training.card import write_card

    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise ValueError(f"--repo must be USER/NAME, got {args.repo}. {str(error).splitlines()[0]}") from error
    if args.repo.count("/") != 1:
        raise ValueError(f"--repo must be USER/NAME, got {args.repo}. Name your user or organisation too.")
    title = args.title or args.repo.partition("/")[2]
    if args.with_code:
        from modeling_fox.hub_fox import add_code

        add_code(args.run / "model")
    card = write_card(args.run, title=title, license=args.license, repo=args.repo)
    files = list_files(card.parent)
    if args.dry_run:
        print(describe(args.repo, files))
        print(card.read_text(encoding="utf-8"))
        return None
    api = HfApi()
    try:
        api.create_repo(args.repo, private=args.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=args.repo,
            folder_path=card.parent,
            allow_patterns=PATTERNS,
            commit_message=f"Upload {title}",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{args.repo} could not be uploaded: {reason}. Is `hf auth login` done?") from error
    print(describe(args.repo, files))
    print(f"published {commit.commit_url}")
    return commit.commit_url


def list_files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of exactly what `upload_folder` would take."""
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [(name, (folder / name).stat().st_size) for name in filter_repo_objects(names, allow_patterns=PATTERNS)]


def describe(repo: str, files: list[tuple[str, int]]) -> str:
    """The list of files, one a line."""
    total = sum(size for _, size in files)
    lines = [f"{len(files)} files, {total:,} bytes, for {repo}:", *(f"{size:>15,}  {name}" for name, size in files)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
