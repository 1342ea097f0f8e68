"""A trained model from its checkpoint, ready to look at boxes of pictures."""

import numpy as np
import torch

from tools.lib.checkpoints import load_checkpoint, stored_scheme, upgraded
from tools.lib.cli import UserError, from_stored, single_line
from tools.lib.runtime import choose_amp


class TrainedModel:
    """What a checkpoint holds: model (in eval mode), scheme, config, size of its crops in pixels, metrics,
    epoch; `whole` where it looks at whole pictures (`--crop image`).

    Files know plain types alone; a subclass says what to make of them: Config, Scheme, Network, and how to
    crop(image, box, size, padding, rotation) and predict_crops(model, crops, matrices, config, flip_index,
    amp). Raises UserError for a file that does not fit together.
    """

    def __init__(self, path, device="cpu", batch_size=32):
        checkpoint = load_checkpoint(path)
        self.device, self.batch_size = torch.device(device), batch_size
        self.size, self.epoch, self.metrics = (checkpoint[name] for name in ("size", "epoch", "metrics"))
        try:
            self.scheme = self.Scheme(**stored_scheme(checkpoint["scheme"], path))
            self.config = from_stored(self.Config, checkpoint["args"])
            self.model = self.Network(self.config.backbone, len(self.scheme.names))
            self.model.load_state_dict(upgraded(checkpoint["model"]))
        except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as e:
            raise UserError(f"{path}: weights, scheme and settings do not fit together "
                            f"({single_line(e)})") from None
        self.model.eval().to(device, memory_format=torch.channels_last)
        self.amp, self.whole = choose_amp(self.device, self.config.amp), self.config.crop == "image"

    def flip_index(self, wanted=True):
        """The partners' permutation as a tensor for mirrored averaging, or None."""
        mirrors = wanted and self.scheme.flip_pairs
        return torch.tensor(self.scheme.flip_index, device=self.device) if mirrors else None

    def look(self, jobs, flip=True):
        """[(image, box), ...] -> points (N, K, 2) in the picture's pixels, scores (N, K).

        A third value in a job turns its crop by so many degrees.
        """
        found, flip_index = [], self.flip_index(flip)
        for start in range(0, len(jobs), self.batch_size):
            cut = [self.crop(image, box, self.size, self.config.padding, *turn)
                   for image, box, *turn in jobs[start:start + self.batch_size]]
            crops, matrices = map(np.stack, zip(*cut))
            _, points, scores = self.predict_crops(self.model, torch.from_numpy(crops), matrices, self.config,
                                                   flip_index, self.amp)
            found.append((points, scores))
        return tuple(map(np.concatenate, zip(*found)))
