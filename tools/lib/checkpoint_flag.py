"""The flag --checkpoint: the same in every tool, with the model in the box as its default."""
import argparse
from pathlib import Path

from tools.lib.cli import UserError
from tools.lib.find import BOXED


def add_checkpoint(parser, about="best_model.pth, or another checkpoint of a run", positional=True):
    """Give a parser --checkpoint, and the place where a checkpoint could stand without a flag until now."""
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help=f"{about} (default: the model in the box)")
    if positional:
        parser.add_argument("positional", type=Path, nargs="?", help=argparse.SUPPRESS)


def take_checkpoint(args):
    """Set args.checkpoint to what was given in either way, else None. Raises UserError where both are."""
    positional = vars(args).pop("positional")
    if args.checkpoint and positional:
        raise UserError(f"--checkpoint {args.checkpoint} and {positional}: give one checkpoint")
    args.checkpoint = args.checkpoint or positional


def or_boxed(checkpoint):
    """A checkpoint's path; None is the model in the box. Raises UserError where this copy has none."""
    if checkpoint is None and not BOXED.is_file():
        raise UserError(f"{BOXED}: no such file, so this copy has no model in the box; "
                        "name a checkpoint with --checkpoint")
    return checkpoint or BOXED
