"""The flag --checkpoint: the same in every tool, with the model in the box as its default."""
import argparse
from pathlib import Path

from tools.lib.cli import UserError


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
